//! Carries the guest's connections to where they were meant to go, if they may.
//!
//! ```text
//!  accepted ─► does the name matter? ─► hear it, within bounds ─► permitted? ─► connect ─► carry bytes both ways
//!                     │ no                                       ▲ │ no                     │ the rules change
//!                     └──────────────────────────────────────────┘ ▼                        ▼
//!                                                                  reset ◄─────────── not permitted any more
//! ```

use std::{io, sync::Arc, time::Duration};

use rustix::net::sockopt;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::timeout,
};

use super::{
    Shared, hello, http,
    http::Head,
    rules::{Rules, Said},
};

/// How many streams there are at the same time. The next one waits until one has ended.
pub(super) const STREAMS: usize = 256;
/// How long a guest may take to say which name it means.
const HEAD_BOUND: Duration = Duration::from_secs(15);
/// In how many parts it may say that: each of them is a look at all that came before.
const PARTS: usize = 256;
/// How long the other end may take to accept.
const CONNECT_BOUND: Duration = Duration::from_secs(30);
/// How much a guest may send after its one request before that is taken for no accident.
const AFTER_LIMIT: usize = 64 * 1024;
/// After so many seconds of silence it is asked whether the other end is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(120);

/// Serves connections for ever.
pub(super) async fn serve(shared: Arc<Shared>, listener: TcpListener) -> io::Error {
    accept_each(listener, STREAMS, |guest| {
        let shared = Arc::clone(&shared);
        async move {
            // Whatever goes wrong with one stream is told to its guest by its end.
            let _ = carry(&shared, guest).await;
        }
    })
    .await
}

/// Does something with each connection, with so many at the same time; the next one waits. Comes back when none can be
/// accepted any more.
pub(super) async fn accept_each<W: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    at_once: usize,
    work: impl Fn(TcpStream) -> W,
) -> io::Error {
    let permits = Arc::new(Semaphore::new(at_once));
    loop {
        // It is never closed.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { continue };
        match listener.accept().await {
            Ok((stream, _)) => {
                let work = work(stream);
                tokio::spawn(async move {
                    work.await;
                    drop(permit);
                });
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => return error,
        }
    }
}

/// A message of the name service with its length before it, if it is not longer than this.
pub(super) async fn framed(stream: &mut TcpStream, at_most: usize) -> io::Result<Vec<u8>> {
    let length = usize::from(stream.read_u16().await?);
    if length > at_most {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Whether a failed accept says nothing about the next one.
pub(super) fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

/// What the guest sent before it was decided, and how it is to be sent on.
enum Opening {
    /// As it is.
    Plain(Vec<u8>),
    /// One request, and what was read behind its head.
    Request(Head, Vec<u8>),
}

async fn carry(shared: &Shared, mut guest: TcpStream) -> io::Result<()> {
    // An end that the other side did not ask for is a reset, so that nobody takes it for the end of the data.
    reset_on_drop(&guest)?;
    let target = sockopt::ip_original_dst(&guest)?;
    let mut watched = shared.rules.clone();
    let (said, opening) = if shared.rules().depend_on_name(target) {
        timeout(HEAD_BOUND, hear(&mut guest)).await??
    } else {
        (Said::Nothing, Opening::Plain(Vec::new()))
    };
    // From here on every change of the rules is seen: by this look or by the watch.
    let names = shared.names(*target.ip());
    let permitted = |rules: &Rules| {
        let pinned = names.iter().any(|name| rules.allows(name));
        rules.permit(target, &said, pinned)
    };
    if !permitted(&watched.borrow_and_update()) {
        return Ok(());
    }
    let work = async {
        let mut server = timeout(CONNECT_BOUND, TcpStream::connect(target)).await??;
        reset_on_drop(&server)?;
        for end in [&guest, &server] {
            end.set_nodelay(true)?;
            sockopt::set_socket_keepalive(end, true)?;
            sockopt::set_tcp_keepidle(end, KEEP_ALIVE)?;
        }
        match opening {
            Opening::Plain(first) => {
                server.write_all(&first).await?;
                copy_bidirectional(&mut guest, &mut server).await?;
            }
            Opening::Request(head, rest) => one_request(&mut guest, &mut server, head, &rest).await?,
        }
        for end in [&guest, &server] {
            sockopt::set_socket_linger(end, None)?;
        }
        Ok(())
    };
    tokio::select! {
        outcome = work => outcome,
        () = forbidden(&mut watched, permitted) => Ok(()),
    }
}

fn reset_on_drop(stream: &TcpStream) -> io::Result<()> {
    Ok(sockopt::set_socket_linger(stream, Some(Duration::ZERO))?)
}

/// Comes back when the rules have changed so that something is not permitted any more.
async fn forbidden(watched: &mut watch::Receiver<Arc<Rules>>, permitted: impl Fn(&Rules) -> bool) {
    // When nobody can change them any more, the process ends.
    while watched.changed().await.is_ok() {
        if !permitted(&watched.borrow_and_update()) {
            return;
        }
    }
}

/// What a guest says about whom its connection is for, and what it sent until then.
async fn hear(guest: &mut TcpStream) -> io::Result<(Said, Opening)> {
    let said = |name: Option<String>| name.map_or(Said::Nothing, Said::Name);
    let mut bytes = Vec::with_capacity(2048);
    for _ in 0..PARTS {
        if guest.read_buf(&mut bytes).await? == 0 {
            break;
        }
        match hello::listen(&bytes) {
            hello::Heard::Hello(name) => return Ok((said(name), Opening::Plain(bytes))),
            hello::Heard::Incomplete => continue,
            hello::Heard::Other => {}
        }
        match http::listen(&bytes) {
            http::Heard::Head(head) => {
                let rest = bytes.split_off(head.length);
                return Ok((said(head.name.clone()), Opening::Request(head, rest)));
            }
            http::Heard::Incomplete => {}
            http::Heard::Other => break,
        }
    }
    Ok((Said::Unread, Opening::Plain(bytes)))
}

/// Sends one request on, and everything that comes back. Nothing that a guest sends after its request is sent.
async fn one_request(
    guest: &mut TcpStream,
    server: &mut TcpStream,
    head: Head,
    rest: &[u8],
) -> io::Result<()> {
    let (mut from_guest, mut to_guest) = guest.split();
    let (mut from_server, mut to_server) = server.split();
    let send = async {
        request(&mut from_guest, &mut to_server, head, rest).await?;
        let mut ignored = tokio::io::sink();
        let mut after = (&mut from_guest).take(AFTER_LIMIT as u64);
        if copy(&mut after, &mut ignored).await? == AFTER_LIMIT as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // The guest says nothing more.
        to_server.shutdown().await
    };
    let receive = async {
        copy(&mut from_server, &mut to_guest).await?;
        to_guest.shutdown().await
    };
    tokio::pin!(send, receive);
    // The answer may be there before the request is.
    tokio::select! {
        received = &mut receive => received,
        sent = &mut send => {
            sent?;
            receive.await
        }
    }
}

async fn request(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    mut head: Head,
    rest: &[u8],
) -> io::Result<()> {
    to.write_all(&head.forwarded).await?;
    let mut bytes = rest.to_vec();
    loop {
        let taken = head.body.take(&bytes).map_err(io::Error::other)?;
        to.write_all(&bytes[..taken]).await?;
        if head.body.is_over() {
            return Ok(());
        }
        bytes.clear();
        bytes.reserve(16 * 1024);
        if from.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}
