//! `POST /init`: the one call that makes a guest itself.
//!
//! Everything in the body is optional, and what is absent stays as it is. The body is read into [`Order`], where
//! every value is checked before anything is done. Then the machine is changed in the order of [`carry_out`];
//! if any step fails the guest is closed and stays so, until an `/init` succeeds.
//!
//! The call comes from the host. In a virtual machine it is refused from any other address than the gateway's,
//! so that no program in the guest can make itself the owner. Once there is a token the call must prove it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use buffa_types::google::protobuf::Timestamp;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;

use super::{
    auth::{TOKEN_HEADER, Token, UNAUTHORIZED},
    machine::{self, MachineError},
    state::{Agent, Gate, Identity, Place},
};
use crate::{
    console::{chain, say},
    disk,
    network::GATEWAY,
};

/// The most bytes that the body may have.
pub(crate) const MAXIMUM_BODY: usize = 1 << 20;

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
}

/// The body, checked.
#[derive(Debug, Default)]
struct Order {
    token: Option<Token>,
    environment: Option<BTreeMap<String, String>>,
    clock: Option<Timestamp>,
    default_user: Option<String>,
    default_directory: Option<String>,
    hostname: Option<String>,
    entropy: Option<Vec<u8>>,
    machine_id: Option<String>,
    dns_servers: Option<Vec<IpAddr>>,
    disk_bytes: Option<u64>,
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
    #[error("only the host may call this")]
    NotTheHost,
    #[error("{UNAUTHORIZED}")]
    Unauthorized,
    #[error("{0}")]
    Machine(String),
}

impl InitError {
    /// The HTTP status of this error.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Body(_) | Self::NoObject | Self::Field { .. } => StatusCode::BAD_REQUEST,
            Self::NotTheHost => StatusCode::FORBIDDEN,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Machine(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// Whether this caller may call `/init`.
pub(crate) fn check_caller(place: Place, caller: SocketAddr) -> Result<(), InitError> {
    match place {
        Place::Guest if caller.ip() != IpAddr::V4(GATEWAY) => Err(InitError::NotTheHost),
        Place::Guest | Place::Outside => Ok(()),
    }
}

/// Makes the guest what the body says.
pub(crate) async fn initialise(
    agent: &Arc<Agent>,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(), InitError> {
    let body = Body::parse(body)?;
    let _one_at_a_time = agent.initialising.lock().await;
    let current = agent.identity();
    if let Some(token) = &current.token {
        let in_header = headers.get(TOKEN_HEADER).map(http::HeaderValue::as_bytes);
        let proof = in_header.or_else(|| body.access_token.as_deref().map(str::as_bytes));
        if !proof.is_some_and(|proof| token.matches(proof)) {
            return Err(InitError::Unauthorized);
        }
    }
    let order = body.check()?;
    if agent.place == Place::Guest && current.gate != Gate::Open && order.entropy.is_none() {
        return Err(InitError::Field { field: "entropy", problem: "is needed to open a guest" });
    }
    let mut identity = Identity::clone(&current);
    let answer = match agent.place {
        Place::Guest => carry_out(&order).await,
        Place::Outside => Ok(()),
    };
    identity.gate = match &answer {
        Ok(()) => Gate::Open,
        Err(error) => {
            say(format_args!("init failed: {error}"));
            Gate::Closed(error.to_string())
        }
    };
    if answer.is_ok() {
        order.apply(&mut identity);
    }
    agent.set_identity(identity);
    answer
}

/// Changes the machine. Growing the disk is mostly waiting, so it goes on beside the rest.
async fn carry_out(order: &Order) -> Result<(), InitError> {
    let disk = order.disk_bytes.map(|bytes| tokio::task::spawn_blocking(move || disk::grow_root(bytes)));
    let rest = change_machine(order);
    let disk = match disk {
        None => Ok(()),
        Some(task) => match task.await {
            Ok(answer) => answer,
            Err(_) => return Err(InitError::Machine("growing the disk was interrupted".to_owned())),
        },
    };
    rest.map_err(|error| InitError::Machine(chain(&error)))?;
    disk.map_err(|error| InitError::Machine(chain(&error)))
}

/// Randomness first: nothing else may draw from a generator that other clones share.
fn change_machine(order: &Order) -> Result<(), MachineError> {
    let root = Path::new("/");
    if let Some(entropy) = &order.entropy {
        machine::renew_randomness(entropy)?;
    }
    if let Some(clock) = &order.clock {
        machine::set_clock(clock.seconds, clock.nanos)?;
    }
    if let Some(hostname) = &order.hostname {
        machine::set_hostname(root, hostname)?;
    }
    if let Some(id) = &order.machine_id {
        machine::set_machine_id(root, id)?;
    }
    if let Some(servers) = &order.dns_servers {
        machine::set_dns_servers(root, servers)?;
    }
    Ok(())
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

    fn check(self) -> Result<Order, InitError> {
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
            clock: self.timestamp,
            default_user: given(self.default_user),
            default_directory,
            hostname,
            entropy,
            machine_id,
            dns_servers: self.dns_servers,
            disk_bytes: self.disk_bytes,
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
    use super::*;

    fn check(json: &str) -> Result<Order, InitError> {
        Body::parse(json.as_bytes())?.check()
    }

    #[test]
    fn the_whole_body_is_understood() {
        let entropy = STANDARD.encode([1; 32]);
        let order = check(&format!(
            r#"{{"accessToken":"t","envVars":{{"A":"b"}},"timestamp":"2026-11-22T03:04:05.25Z","defaultUser":"user",
                "defaultWorkdir":"/home/user","hostname":"sb-1","entropy":"{entropy}",
                "machineId":"00112233445566778899aabbccddeeff","dnsServers":["1.1.1.1"],"diskBytes":21474836480,
                "volumeMounts":[],"hyperloopIP":"192.0.2.1"}}"#
        ));
        let order = order.unwrap();
        assert_eq!(order.clock.as_ref().map(|time| time.nanos), Some(250_000_000));
        assert_eq!(order.disk_bytes, Some(20 << 30));
        assert_eq!(order.entropy.as_deref(), Some([1; 32].as_slice()));
    }

    #[test]
    fn what_cannot_be_done_is_refused_before_anything_is() {
        let table = [
            r#"{"entropy":"AAAA"}"#,
            r#"{"entropy":"***"}"#,
            r#"{"hostname":"a b"}"#,
            r#"{"hostname":"-a"}"#,
            r#"{"machineId":"../../etc"}"#,
            r#"{"envVars":{"A=B":"c"}}"#,
            r#"{"envVars":{"A":"c\u0000"}}"#,
            r#"{"defaultWorkdir":"relative"}"#,
            r#"{"dnsServers":["nonsense"]}"#,
            r#"{"timestamp":"yesterday"}"#,
            r#"{"timestamp":"1960-01-01T00:00:00Z"}"#,
            r#"{"diskBytes":-1}"#,
            r#"[]"#,
        ];
        for json in table {
            assert_eq!(check(json).unwrap_err().status(), StatusCode::BAD_REQUEST, "{json}");
        }
        assert!(check(r#"{"accessToken":"","defaultUser":"","hostname":""}"#).unwrap().token.is_none());
    }

    #[test]
    fn in_a_guest_only_the_gateway_may_call() {
        let from = |address: &str| check_caller(Place::Guest, format!("{address}:1").parse().unwrap());
        assert!(from("169.254.0.22").is_ok());
        for address in ["127.0.0.1", "169.254.0.21", "172.17.0.2", "[::1]"] {
            assert_eq!(from(address).unwrap_err().status(), StatusCode::FORBIDDEN, "{address}");
        }
        assert!(check_caller(Place::Outside, "127.0.0.1:1".parse().unwrap()).is_ok());
    }
}
