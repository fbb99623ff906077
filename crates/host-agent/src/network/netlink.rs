//! Links, addresses, routes and neighbours of one namespace, over a netlink socket that was opened in it.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsFd as _, AsRawFd as _},
    time::Duration,
};

use futures::{StreamExt as _, TryStreamExt as _};
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_core::{
        DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    },
    packet_route::{
        RouteNetlinkMessage,
        link::{InfoData, InfoKind, InfoVeth, LinkAttribute},
        tc::{TcAttribute, TcHandle, TcMessage, TcOption},
    },
};
use tokio::time::timeout;
use wrenn_host_linux::netns::NetworkNamespace;

use super::shaping::Bucket;

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

    /// Lets a link send no faster than a token bucket allows, in place of what was there. What is on its
    /// way is not lost where a bucket was there already.
    pub(super) async fn set_bucket(&self, index: u32, bucket: Bucket) -> Result<(), NetlinkError> {
        let mut message = root_queue(index);
        message.attributes = vec![
            TcAttribute::Kind("tbf".to_owned()),
            TcAttribute::Options(token_bucket(bucket).into_iter().map(TcOption::Other).collect()),
        ];
        let message = RouteNetlinkMessage::NewQueueDiscipline(message);
        let request = self.request(message, NLM_F_CREATE | NLM_F_REPLACE);
        bounded("limit the rate of link", index, request).await
    }

    /// Lets a link send as fast as it can. It is no error where it could already.
    pub(super) async fn remove_bucket(&self, index: u32) -> Result<(), NetlinkError> {
        let request = self.request(RouteNetlinkMessage::DelQueueDiscipline(root_queue(index)), 0);
        match bounded("lift the limit of link", index, request).await {
            Err(error) if error.is(io::ErrorKind::NotFound) => Ok(()),
            outcome => outcome,
        }
    }

    /// What rtnetlink has no words for.
    async fn request(&self, message: RouteNetlinkMessage, flags: u16) -> Result<(), rtnetlink::Error> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self.handle.clone().request(message)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload {
                return Err(rtnetlink::Error::NetlinkError(error));
            }
        }
        Ok(())
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

/// What leaves a link.
fn root_queue(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = TcHandle::ROOT;
    message
}

/// The options of the kernel's `tbf`, as linux/pkt_sched.h has them.
fn token_bucket(bucket: Bucket) -> [DefaultNla; 3] {
    const PARAMETERS: u16 = 1;
    const RATE64: u16 = 4;
    const BURST: u16 = 6;
    /// Bytes on the link are counted as they are, and no table of transmission times is needed.
    const ETHERNET: u8 = 1;
    let rate = u32::try_from(bucket.rate).unwrap_or(u32::MAX);
    // struct tc_tbf_qopt: two of struct tc_ratespec (the second, for the peak, is not used), the length of
    // the queue in bytes, and two times that the attribute for the burst stands for.
    let mut parameters = [0; 36];
    parameters[1] = ETHERNET;
    parameters[8..12].copy_from_slice(&rate.to_ne_bytes());
    parameters[24..28].copy_from_slice(&bucket.queue.to_ne_bytes());
    [
        DefaultNla::new(PARAMETERS, parameters.to_vec()),
        DefaultNla::new(RATE64, bucket.rate.to_ne_bytes().to_vec()),
        DefaultNla::new(BURST, bucket.burst.to_ne_bytes().to_vec()),
    ]
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
