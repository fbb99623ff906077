//! Links, addresses, routes and neighbours of one namespace, over a netlink socket that was opened in it.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsFd as _, AsRawFd as _},
    time::Duration,
};

use futures::TryStreamExt as _;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute},
};
use tokio::time::timeout;
use wrenn_host_linux::netns::NetworkNamespace;

/// How long the kernel may take for one request.
const BOUND: Duration = Duration::from_secs(10);

/// A request that the kernel did not do.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket could be opened in the namespace.
    #[error("could not open a netlink socket")]
    Open(#[source] io::Error),
    /// The kernel refused.
    #[error("could not {operation} {subject}")]
    Refused {
        /// What was to be done.
        operation: &'static str,
        /// To what.
        subject: String,
        /// What the kernel said.
        #[source]
        source: rtnetlink::Error,
    },
    /// The kernel did not answer.
    #[error("could not {operation} {subject} within {BOUND:?}")]
    TimedOut {
        /// What was to be done.
        operation: &'static str,
        /// To what.
        subject: String,
    },
    /// There is no such link.
    #[error("there is no link {0}")]
    NoLink(String),
}

/// Speaks to the kernel about one namespace.
#[derive(Debug, Clone)]
pub(super) struct Netlink {
    handle: Handle,
}

impl Netlink {
    /// Opens the socket in a namespace. It is there until the last clone is dropped.
    pub(super) async fn open(namespace: &NetworkNamespace) -> Result<Self, NetlinkError> {
        let opened = namespace.run(rtnetlink::new_connection).await.and_then(|opened| opened);
        let (connection, handle, _) = opened.map_err(NetlinkError::Open)?;
        // It ends when the last handle is gone.
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Makes a veth pair: `outer` here, in `group` from its first moment on, and `inner` in another
    /// namespace. Both are down.
    pub(super) async fn add_veth(
        &self,
        outer: &str,
        group: u32,
        inner: &str,
        namespace: &NetworkNamespace,
    ) -> Result<(), NetlinkError> {
        // The kernel looks at the descriptor while it takes the message, and `namespace` outlives that.
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(inner)
            .setns_by_fd(namespace.as_fd().as_raw_fd())
            .build();
        let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(outer)
            .link_group(group)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        bounded("make the veth pair", outer, self.handle.link().add(message).execute()).await
    }

    /// The number of a link.
    pub(super) async fn index(&self, name: &str) -> Result<u32, NetlinkError> {
        self.find(name).await?.ok_or_else(|| NetlinkError::NoLink(name.to_owned()))
    }

    async fn find(&self, name: &str) -> Result<Option<u32>, NetlinkError> {
        let mut found = std::pin::pin!(self.handle.link().get().match_name(name).execute());
        match bounded("look for the link", name, found.try_next()).await {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(error) if error.is(io::ErrorKind::NotFound) || error.is_no_device() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The names of all links that begin with `prefix`.
    pub(super) async fn list(&self, prefix: &str) -> Result<Vec<String>, NetlinkError> {
        let links = self.handle.link().get().execute().try_collect::<Vec<_>>();
        let attributes =
            bounded("list links", prefix, links).await?.into_iter().flat_map(|link| link.attributes);
        let names = attributes.filter_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name),
            _ => None,
        });
        Ok(names.filter(|name| name.starts_with(prefix)).collect())
    }

    /// Gives a link its alias, which says to a person whose it is, and sets it up.
    pub(super) async fn up(&self, index: u32, alias: &str) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).alias(alias).up().build();
        bounded("set up the link", alias, self.handle.link().set(message).execute()).await
    }

    /// Sets a link's Ethernet address.
    pub(super) async fn set_mac(&self, index: u32, mac: [u8; 6]) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).address(mac.to_vec()).build();
        bounded("set the Ethernet address of link", index, self.handle.link().set(message).execute()).await
    }

    /// Gives a link an address.
    pub(super) async fn add_address(
        &self,
        index: u32,
        address: Ipv4Addr,
        prefix: u8,
    ) -> Result<(), NetlinkError> {
        let request = self.handle.address().add(index, address.into(), prefix);
        bounded("add the address", address, request.execute()).await
    }

    /// Says once for ever which Ethernet address a neighbour has. Nobody is asked, and nobody's claim to
    /// the contrary is believed.
    pub(super) async fn add_neighbour(
        &self,
        index: u32,
        address: Ipv4Addr,
        mac: [u8; 6],
    ) -> Result<(), NetlinkError> {
        let request = self.handle.neighbours().add(index, address.into()).link_layer_address(&mac);
        bounded("add the neighbour", address, request.execute()).await
    }

    /// Sends everything that has no other way through `gateway`.
    pub(super) async fn add_default_route(&self, index: u32, gateway: Ipv4Addr) -> Result<(), NetlinkError> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(index).build();
        bounded("add the route through", gateway, self.handle.route().add(route).execute()).await
    }

    /// Deletes a link, and with one end of a veth pair the other. Answers whether it was there.
    pub(super) async fn delete(&self, name: &str) -> Result<bool, NetlinkError> {
        let Some(index) = self.find(name).await? else { return Ok(false) };
        match bounded("delete the link", name, self.handle.link().del(index).execute()).await {
            Ok(()) => Ok(true),
            // It went in the meantime, with its other end.
            Err(error) if error.is_no_device() => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl NetlinkError {
    fn code(&self) -> Option<io::Error> {
        match self {
            Self::Refused { source: rtnetlink::Error::NetlinkError(message), .. } => Some(message.to_io()),
            _ => None,
        }
    }

    fn is(&self, kind: io::ErrorKind) -> bool {
        self.code().is_some_and(|code| code.kind() == kind)
    }

    fn is_no_device(&self) -> bool {
        const ENODEV: i32 = 19;
        self.code().is_some_and(|code| code.raw_os_error() == Some(ENODEV))
    }
}

async fn bounded<T>(
    operation: &'static str,
    subject: impl ToString,
    request: impl Future<Output = Result<T, rtnetlink::Error>>,
) -> Result<T, NetlinkError> {
    match timeout(BOUND, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(NetlinkError::Refused { operation, subject: subject.to_string(), source }),
        Err(_) => Err(NetlinkError::TimedOut { operation, subject: subject.to_string() }),
    }
}
