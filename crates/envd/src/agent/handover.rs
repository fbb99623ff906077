//! What an agent leaves to the one that is started after it.
//!
//! ```text
//!  process 1 ── a file in memory, as standard input ──► agent ── dies ──► agent
//!                         ▲                               │ writes who the guest is, when that changes
//!                         └───────────────────────────────┘ empties it whenever the guest is closed
//! ```
//!
//! An agent that is killed must not take the sandbox with it: the host gave the identity once and is not asked again. The
//! file has no name, so nobody but the agent and process 1 reach it, and it is standard input because no program
//! inherits that from the agent. A snapshot is taken of a guest that is closed, so the file is empty in its clones,
//! and an agent that dies in one before `/init` is followed by one that is just as closed.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{FileType, fstat, ftruncate},
    io::{Errno, pread, pwrite, retry_on_intr},
};
use serde::{Deserialize, Serialize};

use super::{
    auth::Token,
    state::{Gate, Identity},
};
use crate::console::say;

/// No identity is larger: `/init` takes a body of this size.
const MAXIMUM: usize = 2 << 20;

/// Where it is left.
#[derive(Debug)]
pub(crate) struct Handover {
    file: OwnedFd,
}

/// An identity as it is written.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Left {
    frozen: bool,
    token: Option<String>,
    environment: BTreeMap<String, String>,
    default_user: String,
    default_directory: Option<String>,
}

impl Handover {
    /// Standard input, which must be a file.
    pub(crate) fn on_standard_input() -> io::Result<Self> {
        Self::new(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?)
    }

    fn new(file: OwnedFd) -> io::Result<Self> {
        if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "standard input is not a file"));
        }
        Ok(Self { file })
    }

    /// Leaves this identity, or nothing where the guest is closed. Whatever interrupts it, what is left is whole or
    /// is nothing.
    pub(crate) fn leave(&self, identity: &Identity) {
        if let Err(error) = self.write(identity) {
            say(format_args!("cannot leave the identity to the next agent: {error}"));
        }
    }

    fn write(&self, identity: &Identity) -> io::Result<()> {
        ftruncate(&self.file, 0)?;
        let frozen = match identity.gate {
            Gate::Open => false,
            Gate::Frozen => true,
            Gate::Prepared | Gate::Closed(_) => return Ok(()),
        };
        let left = Left {
            frozen,
            token: identity.token.as_ref().map(|token| token.expose().to_owned()),
            environment: identity.environment.clone(),
            default_user: identity.default_user.clone(),
            default_directory: identity.default_directory.clone(),
        };
        let text = serde_json::to_vec(&left)?;
        let mut written = 0;
        while written < text.len() {
            match retry_on_intr(|| pwrite(&self.file, &text[written..], written as u64))? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                length => written += length,
            }
        }
        Ok(())
    }

    /// What the agent before this one left.
    pub(crate) fn take(&self) -> Option<Identity> {
        match read(&self.file) {
            Ok(text) if text.is_empty() => None,
            Ok(text) => match serde_json::from_slice::<Left>(&text) {
                Ok(left) => Some(left.into()),
                Err(error) => {
                    say(format_args!("the agent before this one left nothing whole: {error}"));
                    None
                }
            },
            Err(error) => {
                say(format_args!("cannot read what the agent before this one left: {error}"));
                None
            }
        }
    }
}

fn read(file: impl AsFd) -> Result<Vec<u8>, Errno> {
    let length = usize::try_from(fstat(&file)?.st_size).unwrap_or(0);
    if length > MAXIMUM {
        return Err(Errno::FBIG);
    }
    let mut text = vec![0; length];
    let mut done = 0;
    while done < length {
        match retry_on_intr(|| pread(&file, &mut text[done..], done as u64))? {
            0 => break,
            more => done += more,
        }
    }
    text.truncate(done);
    Ok(text)
}

impl From<Left> for Identity {
    fn from(left: Left) -> Self {
        Self {
            gate: if left.frozen { Gate::Frozen } else { Gate::Open },
            token: left.token.and_then(Token::new),
            environment: left.environment,
            default_user: left.default_user,
            default_directory: left.default_directory,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file() -> (tempfile::NamedTempFile, Handover) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let handover = Handover::new(file.reopen().unwrap().into()).unwrap();
        (file, handover)
    }

    fn identity(gate: Gate) -> Identity {
        Identity {
            gate,
            token: Token::new("secret".to_owned()),
            environment: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
            default_user: "user".to_owned(),
            default_directory: Some("/srv".to_owned()),
        }
    }

    #[test]
    fn an_open_guest_is_handed_over_and_a_closed_one_is_not() {
        let (_file, handover) = file();
        assert!(handover.take().is_none());
        for gate in [Gate::Open, Gate::Frozen] {
            handover.leave(&identity(gate.clone()));
            let taken = handover.take().unwrap();
            assert_eq!((&taken.gate, taken.default_user.as_str()), (&gate, "user"));
            assert!(taken.token.unwrap().matches(b"secret"));
            assert_eq!(taken.environment["A"], "b");
            assert_eq!(taken.default_directory.as_deref(), Some("/srv"));
        }
        for gate in [Gate::Prepared, Gate::Closed("why".to_owned())] {
            handover.leave(&identity(Gate::Open));
            handover.leave(&identity(gate));
            assert!(handover.take().is_none());
        }
    }

    #[test]
    fn what_is_not_a_file_is_refused() {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        assert!(Handover::new(reader).is_err());
    }

    proptest! {
        #[test]
        fn any_content_is_an_identity_or_nothing(text in prop::collection::vec(any::<u8>(), 0..200), cut in 0..120_usize) {
            let (file, handover) = file();
            std::fs::write(file.path(), &text).unwrap();
            prop_assert!(handover.take().is_none());
            // Half of a good one is nothing as well.
            handover.leave(&identity(Gate::Open));
            let whole = std::fs::read(file.path()).unwrap();
            std::fs::write(file.path(), &whole[..cut.min(whole.len() - 1)]).unwrap();
            prop_assert!(handover.take().is_none());
        }
    }
}
