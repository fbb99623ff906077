//! Why there is no slot, or not the one that was asked for.

use std::{io, time::Duration};

use super::{
    addresses::SlotNumber, filter::FilterError, netlink::NetlinkError, nft::NftError, policy::PolicyError,
    uplink::UplinkError,
};

/// What went wrong with a slot.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// All 32767 are leased.
    #[error("every slot of this machine is in use")]
    Exhausted,
    /// It was to be adopted, and this agent uses it already.
    #[error("slot {0} is in use by this agent")]
    InUse(SlotNumber),
    /// It was to be adopted, and no slot of this instance has that number.
    #[error("slot {0} is not one of this instance's")]
    NotOurs(SlotNumber),
    /// An adopted slot's lock was needed, and a process that is not the agent has it.
    #[error("slot {0} is still held by another process")]
    Held(SlotNumber),
    /// The lease could not be taken, written, handed on or removed.
    #[error("could not use the lease of slot {number}")]
    Lease {
        /// Which slot.
        number: SlotNumber,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The namespace could not be made: no permission, or no memory.
    #[error("could not make a network namespace")]
    NewNamespace(#[from] io::Error),
    /// The namespace could not be entered or removed.
    #[error("could not use the network namespace of slot {number}")]
    Namespace {
        /// Which slot.
        number: SlotNumber,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel did not take a setting.
    #[error("could not set {name}")]
    Setting {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no TAP device.
    #[error("could not make a TAP device; /dev/net/tun must be there and usable")]
    Tap(#[source] io::Error),
    /// A link could not be made, changed or deleted.
    #[error("could not change the links of slot {number}")]
    Link {
        /// Which slot.
        number: SlotNumber,
        /// Why.
        #[source]
        source: NetlinkError,
    },
    /// The links of the uplink could not be listed.
    #[error("could not list the links of the uplink")]
    Links(#[source] NetlinkError),
    /// The rules could not be loaded.
    #[error("could not load the rules of slot {number}")]
    Rules {
        /// Which slot.
        number: SlotNumber,
        /// Why.
        #[source]
        source: NftError,
    },
    /// The kernel could not be made to forget a slot's connections.
    #[error("could not clear the connections of slot {number}")]
    Connections {
        /// Which slot.
        number: SlotNumber,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no domain filter, or it did not take its rules.
    #[error("the domain filter of slot {number} is not there")]
    Filter {
        /// Which slot.
        number: SlotNumber,
        /// Why.
        #[source]
        source: FilterError,
    },
    /// The policy cannot be.
    #[error("the network policy cannot be put in force")]
    Policy(#[source] PolicyError),
    /// The uplink cannot be used.
    #[error("the uplink cannot be used")]
    Uplink(#[source] UplinkError),
    /// The leases or namespaces of the machine could not be listed.
    #[error("could not list {path}")]
    List {
        /// Which directory.
        path: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// None came in time.
    #[error("no slot was ready within {0:?}")]
    TimedOut(Duration),
    /// The pool is shut down.
    #[error("the network is being shut down")]
    Stopped,
}
