//! Answers the guest's questions for names, over UDP and TCP.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    time::timeout,
};

use super::{
    Shared,
    dns::{self, Answer, Code, MESSAGE_LIMIT, Question},
};

/// How many questions are under way at the same time. One more is lost, as a datagram may be, and asked again.
const QUESTIONS: usize = 128;
/// How many connections there are at the same time.
const CONNECTIONS: usize = 16;
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(10);
/// How long one name server may take.
const SERVER_BOUND: Duration = Duration::from_secs(3);
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
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // It is never closed.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { continue };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) if super::streams::is_of_one_connection(&error) => continue,
            Err(error) => return error,
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let _ = timeout(SILENCE * 6, converse(&shared, stream)).await;
            drop(permit);
        });
    }
}

async fn converse(shared: &Shared, mut stream: TcpStream) -> io::Result<()> {
    for _ in 0..QUESTIONS_PER_CONNECTION {
        let message = timeout(SILENCE, framed(&mut stream)).await??;
        let Some(answer) = respond(shared, &message).await else { return Ok(()) };
        timeout(SILENCE, stream.write_all(&with_length(&answer))).await??;
    }
    Ok(())
}

/// A message with its length before it.
async fn framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = usize::from(stream.read_u16().await?);
    if length > MESSAGE_LIMIT {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

fn with_length(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes(), message].concat()
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
    let Some(answer) = ask_servers(&rules.name_servers, name).await else {
        return nothing(Code::ServerFailure);
    };
    // They may have changed while a server was asked.
    let rules = shared.rules();
    if !rules.may_resolve(name) || answer.aliases.iter().any(|alias| rules.denies(alias)) {
        return nothing(Code::Refused);
    }
    let mut addresses = answer.addresses;
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

/// Asks one server after the other, until one has an answer.
async fn ask_servers(servers: &[Ipv4Addr], name: &str) -> Option<Answer> {
    for server in servers {
        let asked = timeout(SERVER_BOUND, ask(SocketAddrV4::new(*server, 53), name)).await;
        if let Ok(Ok(answer)) = asked
            && answer.code != Code::ServerFailure
        {
            return Some(answer);
        }
    }
    None
}

async fn ask(server: SocketAddrV4, name: &str) -> io::Result<Answer> {
    let id = random()?;
    let question = dns::ask(id, name).ok_or(io::ErrorKind::InvalidInput)?;
    // A socket for each question: its port is as hard to guess as the id.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(server).await?;
    socket.send(&question).await?;
    let mut message = vec![0; MESSAGE_LIMIT];
    loop {
        let length = socket.recv(&mut message).await?;
        match dns::read_answer(&message[..length], id, name) {
            Some(answer) if answer.truncated => break,
            Some(answer) => return Ok(answer),
            // Not the answer to this; that may still come.
            None => {}
        }
    }
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&with_length(&question)).await?;
    let length = usize::from(stream.read_u16().await?);
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    dns::read_answer(&message, id, name).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn random() -> io::Result<u16> {
    let mut bytes = [0; 2];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(u16::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket},
    };

    use super::*;

    /// What a name server says to a question, over one of its two ways.
    fn reply(question: &[u8], addresses: &[Ipv4Addr], truncated: bool) -> Vec<u8> {
        let mut reply = dns::answer(&dns::question(question).unwrap(), Code::Fine, addresses, 7);
        reply[2] |= if truncated { 2 } else { 0 };
        reply
    }

    #[tokio::test]
    async fn an_answer_that_does_not_fit_is_asked_for_again() {
        let (tcp, udp, server) = loop {
            let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = tcp.local_addr().unwrap().port();
            // The other kind of that port may be somebody's.
            if let Ok(udp) = UdpSocket::bind(("127.0.0.1", port)) {
                break (tcp, udp, SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
            }
        };
        let there = Ipv4Addr::new(203, 0, 113, 10);
        let serving = std::thread::spawn(move || {
            let mut message = [0; 512];
            let (length, from) = udp.recv_from(&mut message).unwrap();
            // Somebody who guesses is not believed.
            let mut forged = reply(&message[..length], &[Ipv4Addr::LOCALHOST], false);
            forged[0] ^= 1;
            udp.send_to(&forged, from).unwrap();
            udp.send_to(&reply(&message[..length], &[], true), from).unwrap();
            let (mut stream, _) = tcp.accept().unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut message = vec![0; u16::from_be_bytes(length).into()];
            stream.read_exact(&mut message).unwrap();
            stream.write_all(&with_length(&reply(&message, &[there], false))).unwrap();
        });
        let answer = ask(server, "a.example").await.unwrap();
        assert_eq!((answer.addresses, answer.time_to_live), (vec![there], 7));
        serving.join().unwrap();
    }
}
