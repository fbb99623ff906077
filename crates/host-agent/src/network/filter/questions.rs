//! Asks name servers for addresses, each name once at a time.
//!
//! ```text
//!  question ─► under way already? ─ yes ────────────────────► waits for its answer
//!                  │ no                                              ▲
//!                  └► the servers, one after the other ─► answer ────┘ told to all who wait, and not kept
//! ```
//!
//! Many programs of a guest ask for one name at the same time, and a guest may do so on purpose: a name server hears
//! of it once.
//!
//! An answer over UDP is believed if it comes from the address and port that were asked, to a port that is another one
//! for each question, with the question's random number, and with the name in the same letters, each of which is a
//! capital or not by chance. A server that does not keep letters, or somebody who guesses all but those, makes that the
//! question is asked again over TCP, where nobody can guess.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddrV4},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpStream, UdpSocket},
    sync::watch,
    time::timeout,
};

use super::{
    dns::{self, Answer, Code, MESSAGE_LIMIT},
    streams::framed,
};

/// How many questions are under way at the same time. One more fails.
const UNDER_WAY: usize = 160;
/// How long one name server may take.
const SERVER_BOUND: Duration = Duration::from_secs(3);

/// What is asked of whom. The name is in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    name: String,
    servers: Vec<SocketAddrV4>,
}

/// None until there is an outcome, which is none if no server had an answer.
type Told = Option<Option<Arc<Answer>>>;

/// The questions that are under way. Each is taken out by the task that asks it.
#[derive(Debug, Default)]
pub(super) struct Questions {
    under_way: Mutex<HashMap<Key, Arc<watch::Sender<Told>>>>,
}

/// A question in the list, for as long as its task lives.
struct Listed {
    questions: Arc<Questions>,
    key: Key,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.questions.under_way().remove(&self.key);
    }
}

impl Questions {
    fn under_way(&self) -> MutexGuard<'_, HashMap<Key, Arc<watch::Sender<Told>>>> {
        // Every change of it is one insertion or one removal.
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the first of these servers says that has an answer; none if none has, or too much is asked.
    ///
    /// May be dropped at any moment: the question stays under way, within its bounds, for whoever else waits for it.
    pub(super) async fn ask(self: &Arc<Self>, servers: &[SocketAddrV4], name: &str) -> Option<Arc<Answer>> {
        let mut told = self.join(Key { name: name.to_ascii_lowercase(), servers: servers.to_vec() })?;
        // Nobody tells only where a task has panicked.
        let outcome = told.wait_for(Option::is_some).await.ok()?;
        outcome.clone().flatten()
    }

    /// Waits for a question that is under way, or begins it.
    fn join(self: &Arc<Self>, key: Key) -> Option<watch::Receiver<Told>> {
        let mut under_way = self.under_way();
        if let Some(told) = under_way.get(&key) {
            return Some(told.subscribe());
        }
        if under_way.len() >= UNDER_WAY {
            return None;
        }
        let tell = Arc::new(watch::Sender::new(None));
        let told = tell.subscribe();
        under_way.insert(key.clone(), Arc::clone(&tell));
        let listed = Listed { questions: Arc::clone(self), key };
        tokio::spawn(async move {
            let answer = ask_servers(&listed.key).await;
            tell.send_replace(Some(answer.map(Arc::new)));
        });
        Some(told)
    }
}

/// Asks one server after the other, until one has an answer.
async fn ask_servers(key: &Key) -> Option<Answer> {
    for server in &key.servers {
        let asked = timeout(SERVER_BOUND, ask(*server, &key.name)).await;
        if let Ok(Ok(answer)) = asked
            && answer.code != Code::ServerFailure
        {
            return Some(answer);
        }
    }
    None
}

async fn ask(server: SocketAddrV4, name: &str) -> io::Result<Answer> {
    let (mut id, mut letters) = ([0; 2], [0; 32]);
    for random in [&mut id[..], &mut letters] {
        getrandom::fill(random).map_err(io::Error::other)?;
    }
    let (id, name) = (u16::from_ne_bytes(id), dns::in_letters(name, &letters));
    let question = dns::ask(id, &name).ok_or(io::ErrorKind::InvalidInput)?;
    // A socket for each question: its port is as hard to guess as the id.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(server).await?;
    socket.send(&question).await?;
    let mut message = vec![0; MESSAGE_LIMIT];
    loop {
        let length = socket.recv(&mut message).await?;
        match dns::read_answer(&message[..length], id, &name) {
            Some(answer) if answer.truncated || !answer.is_in_letters => break,
            Some(answer) => return Ok(answer),
            // Not the answer to this; that may still come.
            None => {}
        }
    }
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&dns::with_length(&question)).await?;
    let message = framed(&mut stream, usize::from(u16::MAX)).await?;
    dns::read_answer(&message, id, &name).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, UdpSocket},
    };

    use futures::future::join_all;

    use super::*;

    const THERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

    /// What a name server says to a question, over one of its two ways.
    fn reply(question: &[u8], addresses: &[Ipv4Addr], truncated: bool) -> Vec<u8> {
        let mut reply = dns::answer(&dns::question(question).unwrap(), Code::Fine, addresses, 7);
        reply[2] |= if truncated { 2 } else { 0 };
        reply
    }

    /// Both sockets of a name server.
    fn server() -> (TcpListener, UdpSocket, SocketAddrV4) {
        loop {
            let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = tcp.local_addr().unwrap().port();
            // The other kind of that port may be somebody's.
            if let Ok(udp) = UdpSocket::bind(("127.0.0.1", port)) {
                return (tcp, udp, SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
            }
        }
    }

    /// What is answered when this comes back over UDP, and [`THERE`] over TCP.
    async fn answered(over_udp: impl FnOnce(&[u8]) -> Vec<Vec<u8>> + Send + 'static) -> Answer {
        let (tcp, udp, server) = server();
        let serving = std::thread::spawn(move || {
            let mut message = [0; 512];
            let (length, from) = udp.recv_from(&mut message).unwrap();
            for answer in over_udp(&message[..length]) {
                udp.send_to(&answer, from).unwrap();
            }
            let (mut stream, _) = tcp.accept().unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut message = vec![0; u16::from_be_bytes(length).into()];
            stream.read_exact(&mut message).unwrap();
            stream.write_all(&dns::with_length(&reply(&message, &[THERE], false))).unwrap();
        });
        let answer = ask(server, "a.example").await.unwrap();
        serving.join().unwrap();
        answer
    }

    #[tokio::test]
    async fn an_answer_that_does_not_fit_is_asked_for_again() {
        let answer = answered(|question| {
            // Somebody who guesses is not believed.
            let mut forged = reply(question, &[Ipv4Addr::LOCALHOST], false);
            forged[0] ^= 1;
            vec![forged, reply(question, &[], true)]
        });
        let answer = answer.await;
        assert_eq!((answer.addresses, answer.time_to_live), (vec![THERE], 7));
    }

    #[tokio::test]
    async fn an_answer_in_other_letters_is_not_believed() {
        let answer = answered(|question| {
            let mut forged = reply(question, &[Ipv4Addr::LOCALHOST], false);
            // The first letter of the name, with everything else guessed.
            forged[13] ^= 0x20;
            vec![forged]
        });
        assert_eq!(answer.await.addresses, [THERE]);
    }

    #[tokio::test]
    async fn equal_questions_at_the_same_time_are_one() {
        let (_tcp, udp, server) = server();
        let udp = tokio::net::UdpSocket::from_std({
            udp.set_nonblocking(true).unwrap();
            udp
        });
        let (udp, questions) = (udp.unwrap(), Arc::new(Questions::default()));
        let mut message = [0; 512];
        for round in 0..2 {
            let asking = (0..50).map(|number| {
                let (questions, name) = (Arc::clone(&questions), ["A.example", "a.EXAMPLE"][number % 2]);
                tokio::spawn(async move { questions.ask(&[server], name).await })
            });
            let asking = asking.collect::<Vec<_>>();
            let (length, from) = udp.recv_from(&mut message).await.unwrap();
            let waiting = || questions.under_way().values().map(|tell| tell.receiver_count()).sum::<usize>();
            while waiting() < 50 {
                tokio::task::yield_now().await;
            }
            assert_eq!(questions.under_way().len(), 1);
            udp.send_to(&reply(&message[..length], &[THERE], false), from).await.unwrap();
            for answer in join_all(asking).await {
                assert_eq!(answer.unwrap().unwrap().addresses, [THERE]);
            }
            let more = udp.try_recv_from(&mut message);
            assert_eq!(
                more.unwrap_err().kind(),
                io::ErrorKind::WouldBlock,
                "round {round}: it was asked once"
            );
            assert!(questions.under_way().is_empty(), "an answer is not kept");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_answers_fails_in_time_and_is_forgotten() {
        let ((_one, _silent, first), (_other, _mute, second)) = (server(), server());
        let questions = Arc::new(Questions::default());
        let ask = |name: String| {
            let questions = Arc::clone(&questions);
            async move { questions.ask(&[first, second], &name).await }
        };
        let begin = tokio::time::Instant::now();
        let asked = join_all((0..UNDER_WAY + 5).map(|number| ask(format!("n{number}.example")))).await;
        assert!(asked.iter().all(Option::is_none));
        assert!(
            begin.elapsed() >= SERVER_BOUND && begin.elapsed() < 3 * SERVER_BOUND,
            "{:?}",
            begin.elapsed()
        );
        assert!(questions.under_way().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_leaves_the_question_to_the_others() {
        let (_tcp, _silent, server) = server();
        let questions = Arc::new(Questions::default());
        for _ in 0..3 {
            let given_up = timeout(Duration::from_millis(1), questions.ask(&[server], "a.example")).await;
            assert!(given_up.is_err());
        }
        assert_eq!(questions.under_way().len(), 1);
        for number in 0..2 * UNDER_WAY {
            let _ = questions.join(Key { name: number.to_string(), servers: vec![server] });
        }
        assert_eq!(questions.under_way().len(), UNDER_WAY, "however many are asked");
        tokio::time::sleep(2 * SERVER_BOUND).await;
        assert!(questions.under_way().is_empty());
    }
}
