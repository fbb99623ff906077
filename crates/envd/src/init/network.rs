//! The guest's network: loopback, and one interface with the address that every guest has.
//!
//! The gateway's hardware address is the same everywhere and is written down, so that a guest that was just restored
//! answers without asking for it first. There is no IPv6 on the interface: nothing on the other side speaks it.

use std::fs;

use wrenn_guest_linux::route::{Route, RouteError};

use crate::network::{GATEWAY, GATEWAY_HARDWARE, GUEST, PREFIX};

const INTERFACE: &str = "eth0";

/// Configures both interfaces. A machine without `eth0` is one that has no network, which is no error.
pub(super) fn configure() -> Result<(), RouteError> {
    let mut route = Route::open()?;
    let loopback = route.interface("lo")?;
    route.set_up(loopback)?;
    let Ok(interface) = route.interface(INTERFACE) else { return Ok(()) };
    // Absent where the kernel has no IPv6.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{INTERFACE}/disable_ipv6"), "1");
    route.add_address(interface, GUEST, PREFIX)?;
    route.set_up(interface)?;
    route.add_neighbour(interface, GATEWAY, GATEWAY_HARDWARE)?;
    route.add_default_route(interface, GATEWAY)
}
