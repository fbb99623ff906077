//! The namespace through which sandboxes reach the outside: the host's own, or a named one.

use std::{fmt, fs, io, str::FromStr};

use camino::Utf8Path;
use wrenn_host_linux::netns::{self, NetworkNamespace};
use wrenn_types::InstanceId;

use super::{
    addresses::SLOTS_DIR,
    netlink::{Netlink, NetlinkError},
    nft::{self, NftError},
    ruleset,
};

/// Which namespace it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Uplink {
    /// The one in which the agent runs.
    #[default]
    Host,
    /// A named one (`ip netns add NAME`): in tests, and where sandboxes must not use the host's network.
    Named(NamespaceName),
}

impl Uplink {
    /// Opens the namespace.
    ///
    /// # Errors
    /// It is not there.
    pub fn namespace(&self) -> io::Result<NetworkNamespace> {
        match self {
            Self::Host => NetworkNamespace::current(),
            Self::Named(name) => {
                NetworkNamespace::open(Utf8Path::new(netns::NAMES).join(&name.0).as_std_path())
            }
        }
    }
}

/// The name of a network namespace: 1 to 64 letters, digits, `.`, `_` and `-`, not beginning with a dot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamespaceName(String);

/// The text is not the name of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a namespace's name is 1 to 64 letters, digits, dots, underscores and dashes, and begins with no dot"
)]
pub struct NotANamespaceName;

impl FromStr for NamespaceName {
    type Err = NotANamespaceName;

    fn from_str(text: &str) -> Result<Self, NotANamespaceName> {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if (1..=64).contains(&text.len()) && !text.starts_with('.') && text.bytes().all(known) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NotANamespaceName)
        }
    }
}

impl fmt::Display for NamespaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An uplink that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    /// Its namespace is not there.
    #[error("there is no network namespace for the uplink")]
    Namespace(#[source] io::Error),
    /// The directory of leases or of namespaces could not be made.
    #[error("could not prepare {path}")]
    Directory {
        /// The directory.
        path: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Forwarding could not be turned on.
    #[error("could not turn on IPv4 forwarding (net.ipv4.ip_forward)")]
    Forwarding(#[source] io::Error),
    /// The rules could not be loaded or removed.
    #[error("could not change the uplink's rules")]
    Rules(#[source] NftError),
    /// Netlink does not answer there.
    #[error("could not reach the uplink's links")]
    Netlink(#[source] NetlinkError),
    /// The one instance id whose number is the group of everybody's links.
    #[error("the instance id {0} cannot mark links; take another")]
    InstanceId(InstanceId),
}

/// The uplink of one instance, opened.
#[derive(Debug)]
pub(super) struct OpenUplink {
    /// Whose it is.
    pub(super) instance: InstanceId,
    /// The group of this instance's links.
    pub(super) group: u32,
    /// Where it is.
    pub(super) namespace: NetworkNamespace,
    /// Its links.
    pub(super) netlink: Netlink,
}

impl OpenUplink {
    /// Opens the uplink. Nothing of it is changed.
    pub(super) async fn open(instance: &InstanceId, uplink: &Uplink) -> Result<Self, UplinkError> {
        let group = ruleset::link_group(instance).ok_or_else(|| UplinkError::InstanceId(instance.clone()))?;
        let directory = |path, source| UplinkError::Directory { path, source };
        netns::prepare_names().map_err(|source| directory(netns::NAMES, source))?;
        make_slots_dir().map_err(|source| directory(SLOTS_DIR, source))?;
        let namespace = uplink.namespace().map_err(UplinkError::Namespace)?;
        let netlink = Netlink::open(&namespace).await.map_err(UplinkError::Netlink)?;
        Ok(Self { instance: instance.clone(), group, namespace, netlink })
    }

    /// Puts the rules in force and turns forwarding on. Only after this may a link of ours come up.
    pub(super) async fn prepare(&self) -> Result<(), UplinkError> {
        nft::load(&self.namespace, ruleset::uplink(&self.instance, self.group))
            .await
            .map_err(UplinkError::Rules)?;
        let forwarding = self.namespace.run(turn_forwarding_on).await.and_then(|turned| turned);
        if forwarding.map_err(UplinkError::Forwarding)? {
            tracing::info!("turned on net.ipv4.ip_forward in the uplink's namespace; it stays on");
        }
        Ok(())
    }

    /// Removes the rules: nothing of ours is left there then.
    pub(super) async fn withdraw(&self) -> Result<(), UplinkError> {
        nft::load(&self.namespace, ruleset::without_uplink(&self.instance)).await.map_err(UplinkError::Rules)
    }
}

/// Only root may see the leases: whoever can open one can hold it.
fn make_slots_dir() -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    fs::DirBuilder::new().recursive(true).mode(0o755).create(SLOTS_DIR)?;
    fs::set_permissions(SLOTS_DIR, fs::Permissions::from_mode(0o700))
}

/// Answers whether it was off. It is never turned off again: others may have come to need it.
fn turn_forwarding_on() -> io::Result<bool> {
    const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
    if fs::read_to_string(FORWARDING)?.trim() == "1" {
        return Ok(false);
    }
    fs::write(FORWARDING, "1")?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        for bad in ["", ".", "..", "../x", "a/b", "a b", ".a", &"a".repeat(65)] {
            assert!(bad.parse::<NamespaceName>().is_err(), "{bad}");
        }
        for good in ["a", "uplink-1.b_c", &"a".repeat(64)] {
            assert!(good.parse::<NamespaceName>().is_ok(), "{good}");
        }
    }
}
