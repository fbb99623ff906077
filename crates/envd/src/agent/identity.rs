//! `POST /init`: the one call that makes a guest itself.
//!
//! Everything in the body is optional. The body is read into [`Order`], where
//! every value is checked before anything is done. Then the machine is changed in the order of [`steps`];
//! if any step fails the guest is closed and its processes are stopped, until an `/init` succeeds. Only when all of it
//! is in force do processes that a snapshot froze go on (see [`super::snapshot`]).
//!
//! The call comes from the host ([`super::host`]). Once there is a token the call must prove it. What is absent from
//! the body stays as it is, so the same call again changes nothing; the environment is replaced as a whole.
//!
//! # What makes two clones different
//!
//! | what | how |
//! |---|---|
//! | the kernel's randomness, and all that is drawn from it: `getrandom`, `/dev/urandom`, `random/uuid`, stack canaries and hash seeds of new programs | `entropy`, mixed in, and a new key taken at once |
//! | `/proc/sys/kernel/random/boot_id` | a new one whenever the machine's id is a new one: the same sandbox, resumed, keeps it |
//! | `/etc/machine-id` | `machineId` |
//! | the host's name | `hostname` |
//! | the access token | `accessToken` |
//! | the clock | `timestamp`: when the host sent it, and what has passed since it came, set and not slewed |
//! | whom it speaks to | `restored`: every connection to the outside that the snapshot held is broken off ([`super::callers`]) |
//!
//! The answer says in [`CLOCK_HEADER`] what the clock then is, in nanoseconds since 1970: how long the call was on its way
//! nobody in the guest can know, and a host that finds the clock late says `timestamp` once more.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use buffa_types::google::protobuf::Timestamp;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use tokio::sync::oneshot;

use super::{
    auth::Token,
    host::{self, HostError},
    machine::{self, MachineError},
    state::{Agent, Gate, Identity, Place},
};
use crate::{
    console::{chain, say},
    disk,
};

/// The most bytes that the body may have.
pub(crate) const MAXIMUM_BODY: usize = 1 << 20;

/// The header of the answer that holds the time.
pub(crate) const CLOCK_HEADER: &str = "x-wrenn-clock";

/// When a call came, and on which connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) at: Instant,
    pub(crate) connection: u64,
}

/// The body as it comes. Fields that other hosts send and we have no use for are passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Body {
    access_token: Option<String>,
    env_vars: Option<BTreeMap<String, String>>,
    timestamp: Option<Timestamp>,
    default_user: Option<String>,
    default_workdir: Option<String>,
    hostname: Option<String>,
    entropy: Option<String>,
    machine_id: Option<String>,
    dns_servers: Option<Vec<IpAddr>>,
    disk_bytes: Option<u64>,
    restored: Option<bool>,
}

/// The body, checked.
#[derive(Debug, Default)]
struct Order {
    token: Option<Token>,
    environment: Option<BTreeMap<String, String>>,
    clock: Option<Clock>,
    default_user: Option<String>,
    default_directory: Option<String>,
    hostname: Option<String>,
    entropy: Option<Vec<u8>>,
    machine_id: Option<String>,
    dns_servers: Option<Vec<IpAddr>>,
    disk_bytes: Option<u64>,
    restored: bool,
}

/// A time, and when it was told.
#[derive(Debug, PartialEq)]
struct Clock {
    time: Timestamp,
    told: Instant,
}

impl Clock {
    /// The time after all that has passed since it was told: seconds, and nanoseconds of the next one.
    fn after(&self, passed: Duration) -> (i64, i32) {
        let nanoseconds = i64::from(self.time.nanos) + i64::from(passed.subsec_nanos());
        let seconds = i64::try_from(passed.as_secs()).unwrap_or(i64::MAX);
        let carried = seconds.saturating_add(nanoseconds / 1_000_000_000);
        let rest = i32::try_from(nanoseconds % 1_000_000_000).unwrap_or(0);
        (self.time.seconds.saturating_add(carried), rest)
    }
}

/// Why `/init` did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    #[error("the body is not what it must be: {0}")]
    Body(serde_json::Error),
    #[error("the body is not an object")]
    NoObject,
    #[error("{field} {problem}")]
    Field { field: &'static str, problem: &'static str },
    #[error("{0}")]
    Host(HostError),
    #[error("{0}")]
    Machine(String),
}

impl InitError {
    /// The HTTP status of this error.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Body(_) | Self::NoObject | Self::Field { .. } => StatusCode::BAD_REQUEST,
            Self::Host(error) => error.status(),
            Self::Machine(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// Makes the guest what the body says.
pub(crate) async fn initialise(
    agent: &Arc<Agent>,
    arrival: Arrival,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(), InitError> {
    initialise_by(agent, arrival, headers, body, |order| carry_out(agent.place, order)).await
}

/// The same, with another way to change the machine.
async fn initialise_by<F: Future<Output = Result<Order, InitError>>>(
    agent: &Arc<Agent>,
    arrival: Arrival,
    headers: &HeaderMap,
    body: &[u8],
    change: impl FnOnce(Order) -> F,
) -> Result<(), InitError> {
    let body = Body::parse(body)?;
    let _one_at_a_time = agent.changing.lock().await;
    let current = agent.identity();
    host::check_token(&current, headers, body.access_token.as_deref()).map_err(InitError::Host)?;
    let order = body.check(arrival.at)?;
    if agent.place == Place::Guest && current.gate != Gate::Open && order.entropy.is_none() {
        return Err(InitError::Field { field: "entropy", problem: "is needed to open a guest" });
    }
    let changed = change(order).await.and_then(|order| {
        if order.restored {
            agent.callers.break_off_before(arrival.connection);
        }
        // The last of all, when everything else is in force. Whoever is open has nothing that stands still.
        if current.gate != Gate::Open {
            agent.thaw().map_err(|error| InitError::Machine(chain(&error)))?;
        }
        Ok(order)
    });
    match changed {
        Ok(order) => {
            let mut identity = Identity { gate: Gate::Open, ..Identity::clone(&current) };
            order.apply(&mut identity);
            agent.set_identity(identity);
            Ok(())
        }
        Err(error) => {
            say(format_args!("init failed: {error}"));
            agent.set_gate(Gate::Closed(error.to_string()));
            // They are frozen already, unless the snapshot was taken of a guest that was not prepared.
            if let Err(error) = agent.request_freeze() {
                say(format_args!("cannot freeze the processes: {}", chain(&error)));
            }
            Err(error)
        }
    }
}

/// Changes the machine, if it is ours. Growing the disk is mostly waiting, so it goes on beside the rest, on a thread of
/// its own: those of the runtime may all be waiting for processes that are born frozen.
async fn carry_out(place: Place, order: Order) -> Result<Order, InitError> {
    if place == Place::Outside {
        return Ok(order);
    }
    let failed = |error: &dyn std::error::Error| InitError::Machine(chain(error));
    let disk = match order.disk_bytes {
        None => None,
        Some(bytes) => {
            let (done, wait) = oneshot::channel();
            let thread = std::thread::Builder::new().name("envd-disk".to_owned()).spawn(move || {
                // Whoever asked may have gone away.
                let _ = done.send(disk::grow_root(bytes));
            });
            thread.map_err(|error| failed(&error))?;
            Some(wait)
        }
    };
    let rest = steps(&order).into_iter().try_for_each(|step| step.take(Path::new("/")));
    let disk = match disk {
        None => Ok(()),
        Some(wait) => wait.await.map_err(|error| failed(&error))?,
    };
    rest.map_err(|error| failed(&error))?;
    disk.map_err(|error| failed(&error))?;
    Ok(order)
}

/// One change of the machine.
#[derive(Debug, PartialEq)]
enum Step<'a> {
    Randomness(&'a [u8]),
    Clock(&'a Clock),
    Hostname(&'a str),
    MachineId(&'a str),
    DnsServers(&'a [IpAddr]),
}

/// The changes that are ordered, in their order. Randomness first: nothing else may draw from a generator that other
/// clones share.
fn steps(order: &Order) -> Vec<Step<'_>> {
    [
        order.entropy.as_deref().map(Step::Randomness),
        order.clock.as_ref().map(Step::Clock),
        order.hostname.as_deref().map(Step::Hostname),
        order.machine_id.as_deref().map(Step::MachineId),
        order.dns_servers.as_deref().map(Step::DnsServers),
    ]
    .into_iter()
    .flatten()
    .collect()
}

impl Step<'_> {
    fn take(&self, root: &Path) -> Result<(), MachineError> {
        match self {
            Self::Randomness(entropy) => machine::renew_randomness(root, entropy),
            Self::Clock(clock) => {
                let (seconds, nanoseconds) = clock.after(clock.told.elapsed());
                machine::set_clock(seconds, nanoseconds)
            }
            Self::Hostname(name) => machine::set_hostname(root, name),
            Self::MachineId(id) => machine::set_machine_id(root, id),
            Self::DnsServers(servers) => machine::set_dns_servers(root, servers),
        }
    }
}

impl Order {
    /// What the agent itself remembers of the order.
    fn apply(self, identity: &mut Identity) {
        if self.token.is_some() {
            identity.token = self.token;
        }
        if let Some(environment) = self.environment {
            identity.environment = environment;
        }
        if let Some(user) = self.default_user {
            identity.default_user = user;
        }
        if self.default_directory.is_some() {
            identity.default_directory = self.default_directory;
        }
    }
}

impl Body {
    fn parse(text: &[u8]) -> Result<Self, InitError> {
        match text.trim_ascii() {
            b"" => Ok(Self::default()),
            // A list of values in the order of our fields would be taken too, and nobody means that.
            [b'[', ..] => Err(InitError::NoObject),
            text => serde_json::from_slice(text).map_err(InitError::Body),
        }
    }

    fn check(self, told: Instant) -> Result<Order, InitError> {
        let refuse = |field, problem| Err(InitError::Field { field, problem });
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        let environment = self.env_vars;
        if environment.iter().flatten().any(|(name, value)| !is_variable(name, value)) {
            return refuse("envVars", "has a name or value that no environment can hold");
        }
        let entropy = match given(self.entropy).map(|text| STANDARD.decode(text)) {
            None => None,
            Some(Ok(bytes)) if (32..=wrenn_guest_linux::entropy::MAXIMUM).contains(&bytes.len()) => {
                Some(bytes)
            }
            Some(_) => return refuse("entropy", "is not 32 to 256 bytes in base64"),
        };
        let hostname = given(self.hostname);
        if hostname.as_deref().is_some_and(|name| !is_hostname(name)) {
            return refuse("hostname", "is not a host name");
        }
        let machine_id = given(self.machine_id);
        let is_id =
            |id: &str| id.len() == 32 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if machine_id.as_deref().is_some_and(|id| !is_id(id)) {
            return refuse("machineId", "is not 32 lower case hexadecimal digits");
        }
        if self.timestamp.as_ref().is_some_and(|time| time.seconds < 0) {
            return refuse("timestamp", "is before 1970");
        }
        let default_directory = given(self.default_workdir);
        if default_directory.as_deref().is_some_and(|path| !path.starts_with('/') || path.contains('\0')) {
            return refuse("defaultWorkdir", "is not an absolute path");
        }
        Ok(Order {
            token: self.access_token.and_then(Token::new),
            environment,
            clock: self.timestamp.map(|time| Clock { time, told }),
            default_user: given(self.default_user),
            default_directory,
            hostname,
            entropy,
            machine_id,
            dns_servers: self.dns_servers,
            disk_bytes: self.disk_bytes,
            restored: self.restored.unwrap_or(false),
        })
    }
}

/// Whether a variable can be in an environment: a name, and no zero byte anywhere.
pub(crate) fn is_variable(name: &str, value: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
}

fn is_hostname(name: &str) -> bool {
    let part = |part: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !part.is_empty() && part.bytes().all(plain) && !part.starts_with('-') && !part.ends_with('-')
    };
    name.len() <= 64 && name.split('.').all(part)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, Write};

    use super::{
        super::{
            freezer::tests::{Own, stands_still},
            state::Cgroup,
        },
        *,
    };

    fn check(json: &str) -> Result<Order, InitError> {
        Body::parse(json.as_bytes())?.check(Instant::now())
    }

    fn arrival() -> Arrival {
        Arrival { at: Instant::now(), connection: 1 }
    }

    #[test]
    fn the_whole_body_is_understood() {
        let entropy = STANDARD.encode([1; 32]);
        let order = check(&format!(
            r#"{{"accessToken":"t","envVars":{{"A":"b"}},"timestamp":"2026-11-22T03:04:05.25Z","defaultUser":"user",
                "defaultWorkdir":"/home/user","hostname":"sb-1","entropy":"{entropy}",
                "machineId":"00112233445566778899aabbccddeeff","dnsServers":["1.1.1.1"],"diskBytes":21474836480,
                "volumeMounts":[],"hyperloopIP":"192.0.2.1","restored":true}}"#
        ));
        let order = order.unwrap();
        let clock = order.clock.unwrap();
        assert_eq!(clock.after(Duration::ZERO).1, 250_000_000);
        let (seconds, nanoseconds) = clock.after(Duration::new(2, 800_000_000));
        assert_eq!((seconds - clock.time.seconds, nanoseconds), (3, 50_000_000));
        assert!(order.restored && !check("{}").unwrap().restored);
        assert_eq!(order.disk_bytes, Some(20 << 30));
        assert_eq!(order.entropy.as_deref(), Some([1; 32].as_slice()));
    }

    #[test]
    fn what_cannot_be_done_is_refused_before_anything_is() {
        let table = [
            (r#"{"entropy":"AAAA"}"#, "entropy is not 32 to 256 bytes in base64"),
            (r#"{"entropy":"***"}"#, "entropy is not 32 to 256 bytes in base64"),
            (r#"{"hostname":"a b"}"#, "hostname is not a host name"),
            (r#"{"hostname":"-a"}"#, "hostname is not a host name"),
            (r#"{"machineId":"../../etc"}"#, "machineId is not 32 lower case hexadecimal digits"),
            (r#"{"machineId":"FF112233445566778899AABBCCDDEEFF"}"#, "machineId is not 32 lower case"),
            (r#"{"envVars":{"A=B":"c"}}"#, "envVars has a name or value that no environment can hold"),
            (r#"{"envVars":{"":"c"}}"#, "envVars has a name or value"),
            (r#"{"envVars":{"A":"c\u0000"}}"#, "envVars has a name or value"),
            (r#"{"envVars":{"A":1}}"#, "the body is not what it must be: invalid type: integer"),
            (r#"{"envVars":["A"]}"#, "the body is not what it must be"),
            (r#"{"defaultWorkdir":"relative"}"#, "defaultWorkdir is not an absolute path"),
            (r#"{"defaultWorkdir":"/a\u0000"}"#, "defaultWorkdir is not an absolute path"),
            (r#"{"defaultUser":7}"#, "the body is not what it must be"),
            (r#"{"accessToken":{}}"#, "the body is not what it must be"),
            (r#"{"dnsServers":["nonsense"]}"#, "the body is not what it must be"),
            (r#"{"dnsServers":"1.1.1.1"}"#, "the body is not what it must be"),
            (r#"{"timestamp":"yesterday"}"#, "the body is not what it must be"),
            (r#"{"timestamp":5}"#, "the body is not what it must be"),
            (r#"{"timestamp":"1960-01-01T00:00:00Z"}"#, "timestamp is before 1970"),
            (r#"{"diskBytes":-1}"#, "the body is not what it must be"),
            (r#"{"diskBytes":1e30}"#, "the body is not what it must be"),
            (r#"{"restored":1}"#, "the body is not what it must be"),
            ("[]", "the body is not an object"),
            ("{", "the body is not what it must be: EOF"),
            ("7", "the body is not what it must be"),
            ("\u{feff}{}", "the body is not what it must be"),
        ];
        for (json, text) in table {
            let error = check(json).unwrap_err();
            assert_eq!(error.status(), StatusCode::BAD_REQUEST, "{json}");
            assert!(error.to_string().starts_with(text), "{json}: {error}");
        }
        assert!(check(r#"{"accessToken":"","defaultUser":"","hostname":""}"#).unwrap().token.is_none());
        for json in ["", " ", "{}", r#"{"volumeMounts":[],"lifecycleID":"x","caBundle":"y"}"#] {
            assert!(steps(&check(json).unwrap()).is_empty(), "{json}");
        }
    }

    const ENTROPY: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";

    #[test]
    fn randomness_comes_first() {
        let order = check(&format!(
            r#"{{"dnsServers":["1.1.1.1"],"machineId":"00112233445566778899aabbccddeeff","hostname":"sb-1",
                "timestamp":"2026-11-22T03:04:05Z","entropy":"{ENTROPY}"}}"#
        ));
        let order = order.unwrap();
        let steps = steps(&order);
        assert!(
            matches!(
                steps.as_slice(),
                [
                    Step::Randomness(_),
                    Step::Clock(_),
                    Step::Hostname(_),
                    Step::MachineId(_),
                    Step::DnsServers(_)
                ]
            ),
            "{steps:?}"
        );
    }

    fn guest() -> Arc<Agent> {
        let address = "0.0.0.0:49983".parse().unwrap();
        Arc::new(Agent::new(Place::Guest, address, "root".to_owned(), None, None))
    }

    /// An `/init` whose changes of the machine end so.
    async fn call(
        agent: &Arc<Agent>,
        token: &str,
        body: &str,
        outcome: Result<(), &str>,
    ) -> Result<(), InitError> {
        let mut headers = HeaderMap::new();
        if !token.is_empty() {
            headers.insert("x-access-token", http::HeaderValue::from_str(token).unwrap());
        }
        let outcome = outcome.map_err(|text| InitError::Machine(text.to_owned()));
        let change = |order| async move { outcome.map(|()| order) };
        initialise_by(agent, arrival(), &headers, body.as_bytes(), change).await
    }

    #[tokio::test]
    async fn a_guest_opens_with_entropy_only_and_closes_when_a_step_fails() {
        let agent = guest();
        let good = format!(r#"{{"entropy":"{ENTROPY}","accessToken":"first","envVars":{{"A":"1"}}}}"#);
        let bare = call(&agent, "", "{}", Ok(())).await.unwrap_err();
        assert_eq!(bare.to_string(), "entropy is needed to open a guest");
        assert!(matches!(&agent.identity().gate, Gate::Closed(reason) if reason.contains("initialised")));
        let failed = call(&agent, "", &good, Err("cannot reseed")).await.unwrap_err();
        assert_eq!(failed.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(agent.identity().gate, Gate::Closed("cannot reseed".to_owned()));
        assert!(agent.identity().token.is_none(), "nothing of a failed call is in force");
        for _ in 0..2 {
            call(&agent, "", &good, Ok(())).await.unwrap();
            assert_eq!(agent.identity().gate, Gate::Open);
            assert_eq!(agent.identity().environment["A"], "1");
        }
        // An open guest may be told something without new entropy, by who knows the token.
        for (token, body) in
            [("", "{}"), ("wrong", "{}"), ("wrong", good.as_str()), ("", r#"{"accessToken":"x"}"#)]
        {
            let refused = call(&agent, token, body, Ok(())).await.unwrap_err();
            assert_eq!(refused.status(), StatusCode::UNAUTHORIZED, "{token} {body}");
        }
        call(&agent, "first", r#"{"envVars":{"B":"2"}}"#, Ok(())).await.unwrap();
        assert_eq!(agent.identity().environment.keys().collect::<Vec<_>>(), ["B"]);
        call(&agent, "first", r#"{"hostname":"x"}"#, Err("cannot set the host name")).await.unwrap_err();
        assert_eq!(agent.identity().gate.refusal(), Some("cannot set the host name"));
        call(&agent, "first", "{}", Ok(())).await.unwrap_err();
        call(&agent, "first", &good, Ok(())).await.unwrap();
        assert_eq!(agent.identity().gate, Gate::Open);
    }

    /// From the snapshot to the successful call, and through one whose reseed the kernel refuses: nothing of a user's runs.
    #[tokio::test]
    async fn a_reseed_that_fails_leaves_the_guest_closed_and_its_processes_frozen() {
        let Some(own) = Own::new("reseed") else { return };
        let users = own.directory().join("user");
        std::fs::create_dir(&users).unwrap();
        let cgroup = Cgroup::open(users.clone(), Place::Guest).unwrap();
        let address = "0.0.0.0:49983".parse().unwrap();
        let agent = Arc::new(Agent::new(Place::Guest, address, "root".to_owned(), Some(cgroup), None));
        // Where the random device should be is a file, and then nothing.
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("dev")).unwrap();
        std::fs::write(root.path().join("dev/urandom"), "").unwrap();
        let mut cat = own.cat();
        let (mut input, output) = (cat.stdin.take().unwrap(), cat.stdout.take().unwrap());
        let soon = tokio::time::Instant::now() + std::time::Duration::from_secs(30);
        agent.freeze(soon).await.unwrap();
        agent.set_gate(Gate::Prepared);
        input.write_all(b"line\n").unwrap();

        let body = format!(r#"{{"entropy":"{ENTROPY}"}}"#);
        let headers = HeaderMap::new();
        let frozen = || stands_still(&users);
        for reason in ["cannot add entropy", "cannot open the random device"] {
            let refused = initialise_by(&agent, arrival(), &headers, body.as_bytes(), async |order| {
                assert!(frozen() && agent.identity().gate != Gate::Open);
                let steps = steps(&order);
                assert!(matches!(steps.as_slice(), [Step::Randomness(_)]), "nothing else of this machine");
                let taken = steps.into_iter().try_for_each(|step| step.take(root.path()));
                taken.map_err(|error| InitError::Machine(chain(&error)))?;
                Ok(order)
            });
            let error = refused.await.unwrap_err();
            assert_eq!(error.status(), StatusCode::INTERNAL_SERVER_ERROR);
            let said = error.to_string();
            assert!(
                said.starts_with("cannot make the randomness fresh: ") && said.contains(reason),
                "{said}"
            );
            assert_eq!(agent.identity().gate, Gate::Closed(said));
            assert!(frozen());
            std::fs::remove_file(root.path().join("dev/urandom")).unwrap_or_default();
        }
        assert!(!rustix::io::ioctl_fionread(&output).is_ok_and(|bytes| bytes > 0), "it ran");
        call(&agent, "", &body, Ok(())).await.unwrap();
        assert_eq!(agent.identity().gate, Gate::Open);
        let mut line = String::new();
        std::io::BufReader::new(output).read_line(&mut line).unwrap();
        assert_eq!(line, "line\n");
        drop(input);
        cat.wait().unwrap();
        std::fs::remove_dir(users).unwrap();
    }

    proptest::proptest! {
        #[test]
        fn any_body_is_read_without_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = Body::parse(&bytes).and_then(|body| body.check(Instant::now()));
        }

        #[test]
        fn what_is_taken_is_safe_to_write(hostname in ".{0,70}", id in ".{0,40}", directory in ".{0,20}") {
            let body = serde_json::json!({ "hostname": hostname, "machineId": id, "defaultWorkdir": directory });
            if let Ok(order) = check(&body.to_string()) {
                let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte));
                proptest::prop_assert!(order.hostname.as_deref().is_none_or(|name| plain(name) && name.len() <= 64));
                proptest::prop_assert!(order.machine_id.as_deref().is_none_or(|id| plain(id) && id.len() == 32));
                proptest::prop_assert!(order.default_directory.is_none_or(|path| path.starts_with('/')));
            }
        }
    }
}
