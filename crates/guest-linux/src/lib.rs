//! guest-linux
