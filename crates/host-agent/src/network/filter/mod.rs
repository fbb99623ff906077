//! The domain filter: a process beside a guest whose policy says something about names.
//!
//! ```text
//!  guest ── UDP, TCP 53 ──────────────────► names   ─ allowed? ─► the policy's name servers
//!    │       (whatever server it means)       │ the addresses, pinned to the name
//!    │                                        ▼
//!    ├── TCP to what no list of networks ─► streams ─ on ports 80 and 443: pinned, and ─► the address that it means
//!    │    leaves open                       server name or Host allowed?
//!    │
//!    └── everything else: the rules of the kernel alone ([`super::ruleset`])
//! ```
//!
//! The rules of the slot redirect the guest's questions and connections to it; everything that they do not
//! redirect they decide as ever, by address. So where a name opens an address it opens it for TCP through the
//! filter and for nothing else, and without a filter nothing that names open is open: it fails closed.
//!
//! - **What a name opens.** Only questions for IPv4 addresses are passed on, of names that are allowed. An address
//!   that comes back is *pinned* to the name, for as long as the answer says ([`pins`]), unless it is denied
//!   or where no sandbox may go: a name that leads to a private address leads nowhere. Ports 80 and 443 of pinned
//!   addresses are reached by who says an allowed name, which is looked for in the first message of TLS
//!   ([`hello`]) or in the request ([`http`], one request per connection). Who says none, or an address, is
//!   connected only to a network on the allow list. Other ports are opened by networks alone: one address serves
//!   the names of many, and there nothing tells which is meant. What a server makes of the names *inside* of TLS is not seen.
//! - **Denied names** are not resolved, and a connection to ports 80 and 443 must be TLS or HTTP and say a name that
//!   is none of them; to a network on the allow list it may also say none. By other ports, a deny list of names alone
//!   keeps nobody from an address that it knows already.
//! - **A process of its own.** It parses what a guest sends, so it is not the agent: it runs in the guest's namespace as
//!   a user of its own, with nothing but its sockets and bounds on all that it uses ([`mod@process`], `confinement`). And streams go through it, so it
//!   outlives the agent: the next one finds it again by a socket in the namespace ([`keeper`]).
//! - **Changes** of the policy are told to it before they are told to the kernel. Streams that the new one still permits go on,
//!   the others are reset. A filter stays with its slot when names do not matter any more, for the streams it has.
//! - **Its end** closes the guest's streams. The agent notices, and starts another; pins are forgotten, so a guest
//!   asks again.
//! - **Questions** of ours are one for all who ask for the same name at the same time, and hard to answer for whoever
//!   does not see them ([`questions`]).
//!
//! Everything is bounded: streams, questions under way, bytes before a decision, time for each step, pins.

pub(crate) mod confinement;
pub(super) mod dns;
pub(super) mod hello;
mod http;
mod keeper;
mod names;
mod pins;
mod process;
mod questions;
mod rules;
mod streams;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use tokio::sync::watch;

pub(super) use self::rules::{Rules, WEB_PORTS};
pub use self::{
    keeper::FilterError,
    process::{ProcessError, WORD, main},
};
pub(super) use self::{
    keeper::{Filter, MARK_SUFFIX, end_leftovers, was_started},
    process::{NAMES_PORT, STREAMS_PORT},
};
use self::{pins::Pins, questions::Questions};

/// What the parts of the process share. The rules are changed by [`mod@process`], the pins by [`names`].
#[derive(Debug)]
struct Shared {
    rules: watch::Receiver<Arc<Rules>>,
    pins: Mutex<Pins>,
    questions: Arc<Questions>,
}

impl Shared {
    fn rules(&self) -> Arc<Rules> {
        Arc::clone(&self.rules.borrow())
    }

    fn pins(&self) -> MutexGuard<'_, Pins> {
        // No change of it can be left half-way.
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names to which an address is pinned now.
    fn names(&self, address: std::net::Ipv4Addr) -> Vec<String> {
        self.pins().names(address, Instant::now())
    }
}
