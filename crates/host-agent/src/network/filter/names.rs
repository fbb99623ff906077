//! Answers the guest's questions for names, over UDP and TCP.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    time::timeout,
};

use super::{
    Shared,
    dns::{self, Code, MESSAGE_LIMIT, Question},
    streams::{accept_each, framed},
};

/// How many questions are under way at the same time. One more is lost, as a datagram may be, and asked again.
const QUESTIONS: usize = 128;
/// How many connections there are at the same time.
const CONNECTIONS: usize = 16;
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(10);
/// Where name servers are asked.
const PORT: u16 = 53;
/// How many questions one connection may bring.
const QUESTIONS_PER_CONNECTION: usize = 256;
/// What of an answer's time a guest is told at most, in seconds: less than any pin lasts.
const TIME_TO_LIVE: u32 = 30;

/// Answers datagrams for ever.
pub(super) async fn datagrams(shared: Arc<Shared>, socket: UdpSocket) -> io::Error {
    let (socket, permits) = (Arc::new(socket), Arc::new(Semaphore::new(QUESTIONS)));
    let mut message = vec![0; MESSAGE_LIMIT];
    loop {
        let (length, from) = match socket.recv_from(&mut message).await {
            Ok(received) => received,
            // What a guest's kernel says of an earlier answer is nothing that ends the service.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
            Err(error) => return error,
        };
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else { continue };
        let (shared, socket, message) =
            (Arc::clone(&shared), Arc::clone(&socket), message[..length].to_vec());
        tokio::spawn(async move {
            if let Some(answer) = respond(&shared, &message).await {
                let _ = socket.send_to(&answer, from).await;
            }
            drop(permit);
        });
    }
}

/// Answers connections for ever.
pub(super) async fn connections(shared: Arc<Shared>, listener: TcpListener) -> io::Error {
    accept_each(listener, CONNECTIONS, |stream| {
        let shared = Arc::clone(&shared);
        async move {
            let _ = timeout(SILENCE * 6, converse(&shared, stream)).await;
        }
    })
    .await
}

async fn converse(shared: &Shared, mut stream: TcpStream) -> io::Result<()> {
    for _ in 0..QUESTIONS_PER_CONNECTION {
        let message = timeout(SILENCE, framed(&mut stream, MESSAGE_LIMIT)).await??;
        let Some(answer) = respond(shared, &message).await else { return Ok(()) };
        timeout(SILENCE, stream.write_all(&dns::with_length(&answer))).await??;
    }
    Ok(())
}

/// The answer to what a guest sent; none to what deserves none.
async fn respond(shared: &Shared, message: &[u8]) -> Option<Vec<u8>> {
    match dns::question(message) {
        Ok(question) => {
            let (code, addresses, time_to_live) = resolve(shared, &question).await;
            Some(dns::answer(&question, code, &addresses, time_to_live))
        }
        Err(answer) => answer,
    }
}

async fn resolve(shared: &Shared, question: &Question) -> (Code, Vec<Ipv4Addr>, u32) {
    let nothing = |code| (code, Vec::new(), 0);
    let rules = shared.rules();
    let Some(name) = question.name.as_deref().filter(|name| rules.may_resolve(name)) else {
        return nothing(Code::Refused);
    };
    if !question.for_addresses {
        // There is such a name, and nothing of that kind to be known about it.
        return nothing(Code::Fine);
    }
    let servers: Vec<_> = rules.name_servers.iter().map(|server| SocketAddrV4::new(*server, PORT)).collect();
    let Some(answer) = shared.questions.ask(&servers, name).await else {
        return nothing(Code::ServerFailure);
    };
    // They may have changed while a server was asked.
    let rules = shared.rules();
    if !rules.may_resolve(name) || answer.aliases.iter().any(|alias| rules.denies(alias)) {
        return nothing(Code::Refused);
    }
    let mut addresses = answer.addresses.clone();
    addresses.retain(|address| rules.may_pin(*address));
    // What a guest is not told it cannot use.
    addresses.truncate(dns::ADDRESSES_LIMIT);
    if rules.allows(name) {
        let (mut pins, now) = (shared.pins(), Instant::now());
        for address in &addresses {
            pins.add(*address, name, Duration::from_secs(answer.time_to_live.into()), now);
        }
    }
    (answer.code, addresses, answer.time_to_live.min(TIME_TO_LIVE))
}
