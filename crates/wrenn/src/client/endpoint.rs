//! Where the API is, and the key to it.

use std::{fs, io, net::IpAddr, os::unix::fs::MetadataExt as _};

use camino::{Utf8Path, Utf8PathBuf};
use http::Uri;
use wrenn_control_plane::{ParseProxyDomainError, ProxyDomain};
use wrenn_types::{ApiKey, ParseApiKeyError};

use crate::supervisor::env_file::{API_KEY, BASE_URL, PROXY_DOMAIN, lookup};

/// An API and a key to it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub(super) base: BaseUrl,
    pub(super) key: ApiKey,
    /// Below which the ports of sandboxes have their host names, with the port to connect to where it is not 80.
    pub(super) proxy: String,
}

/// The address of an API: scheme, host, port and a path that all routes are under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseUrl {
    /// `host:port` as it stands in the `Host` header.
    pub(super) authority: String,
    pub(super) host: String,
    pub(super) port: u16,
    /// Without a slash at the end.
    pub(super) prefix: String,
}

/// Why there is no endpoint.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// Nothing says where the API is.
    #[error("{BASE_URL} and {API_KEY} are not set, and there is no {file}")]
    Unset {
        /// The file that would have been read.
        file: Utf8PathBuf,
    },
    /// One of the two variables is missing. Taking the other from a file could send a key to a stranger.
    #[error("{set} is set but {missing} is not; set both, or neither to use the stack of this directory")]
    Half {
        /// The variable that is there.
        set: &'static str,
        /// The variable that is not.
        missing: &'static str,
    },
    /// The file cannot be read.
    #[error("cannot read {file}")]
    Read {
        /// The file.
        file: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file belongs to another user, who could have written anything into it.
    #[error("{file} belongs to another user and is not used")]
    Foreign {
        /// The file.
        file: Utf8PathBuf,
    },
    /// The file lacks a line.
    #[error("{file} has no line for {missing}")]
    Incomplete {
        /// The file.
        file: Utf8PathBuf,
        /// The variable.
        missing: &'static str,
    },
    /// The address is none.
    #[error("{text:?} is not the address of an API; it looks like http://127.0.0.1:8000")]
    NotAnAddress {
        /// The text.
        text: String,
    },
    /// TLS is not built in.
    #[error("{text:?} needs TLS, which this client does not speak yet; use an http:// address")]
    NeedsTls {
        /// The text.
        text: String,
    },
    /// The key is none.
    #[error("{API_KEY} does not hold a key")]
    Key(#[source] ParseApiKeyError),
    /// The domain is none.
    #[error("{PROXY_DOMAIN} does not hold a domain")]
    ProxyDomain(#[source] ParseProxyDomainError),
}

impl Endpoint {
    /// An endpoint of its two parts.
    ///
    /// # Errors
    /// One of them is not what it should be.
    pub fn new(base_url: &str, api_key: &str) -> Result<Self, EndpointError> {
        Self::with_proxy(base_url, api_key, None)
    }

    /// An endpoint of its two parts, and the domain below which ports have their host names. Without one it is that of the
    /// API, and of an API on a loopback address `localhost`.
    fn with_proxy(base_url: &str, api_key: &str, domain: Option<&str>) -> Result<Self, EndpointError> {
        let base: BaseUrl = base_url.parse()?;
        let key = api_key.trim().parse().map_err(EndpointError::Key)?;
        let mut proxy = match domain {
            Some(text) => {
                // The server takes the domain out of the same text and leaves the port to those who connect.
                text.parse::<ProxyDomain>().map_err(EndpointError::ProxyDomain)?;
                text.trim().to_owned()
            }
            None if base.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback()) => {
                "localhost".to_owned()
            }
            None => base.host.clone(),
        };
        if !proxy.contains(':') && base.port != 80 {
            proxy = format!("{proxy}:{}", base.port);
        }
        Ok(Self { base, key, proxy })
    }

    /// The endpoint that the two variables name, or if neither is set the one in `file`.
    ///
    /// # Errors
    /// [`EndpointError`] says which part is missing or wrong.
    pub fn find(variable: impl Fn(&str) -> Option<String>, file: &Utf8Path) -> Result<Self, EndpointError> {
        let set = |name| variable(name).filter(|value| !value.trim().is_empty());
        match (set(BASE_URL), set(API_KEY)) {
            (Some(base_url), Some(api_key)) => {
                Self::with_proxy(&base_url, &api_key, set(PROXY_DOMAIN).as_deref())
            }
            (Some(_), None) => Err(EndpointError::Half { set: BASE_URL, missing: API_KEY }),
            (None, Some(_)) => Err(EndpointError::Half { set: API_KEY, missing: BASE_URL }),
            (None, None) => Self::from_file(file),
        }
    }

    fn from_file(file: &Utf8Path) -> Result<Self, EndpointError> {
        let failed = |source| EndpointError::Read { file: file.to_owned(), source };
        let owner = match fs::metadata(file) {
            Ok(metadata) => metadata.uid(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(EndpointError::Unset { file: file.to_owned() });
            }
            Err(error) => return Err(failed(error)),
        };
        if owner != 0 && owner != rustix::process::geteuid().as_raw() {
            return Err(EndpointError::Foreign { file: file.to_owned() });
        }
        let text = fs::read_to_string(file).map_err(failed)?;
        let line = |missing| {
            lookup(&text, missing).ok_or_else(|| EndpointError::Incomplete { file: file.to_owned(), missing })
        };
        Self::with_proxy(&line(BASE_URL)?, &line(API_KEY)?, lookup(&text, PROXY_DOMAIN).as_deref())
    }
}

impl std::str::FromStr for BaseUrl {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let text = text.trim();
        let wrong = || EndpointError::NotAnAddress { text: text.to_owned() };
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => return Err(EndpointError::NeedsTls { text: text.to_owned() }),
            _ => return Err(wrong()),
        }
        let authority = uri.authority().ok_or_else(wrong)?;
        // A name or password in the address would be sent nowhere; better to say so.
        if authority.as_str().contains('@') || uri.query().is_some() || authority.host().is_empty() {
            return Err(wrong());
        }
        Ok(Self {
            authority: authority.to_string(),
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            prefix: uri.path().trim_end_matches('/').to_owned(),
        })
    }
}

impl std::fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "http://{}{}", self.authority, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "wrn_00112233445566778899aabbccddeeff";

    fn base(text: &str) -> Result<BaseUrl, EndpointError> {
        text.parse()
    }

    #[test]
    fn addresses() {
        let plain = base(" http://127.0.0.1:8000/ ").unwrap();
        assert_eq!((plain.host.as_str(), plain.port, plain.prefix.as_str()), ("127.0.0.1", 8000, ""));
        let long = base("http://[::1]/api/").unwrap();
        assert_eq!((long.host.as_str(), long.port, long.prefix.as_str()), ("::1", 80, "/api"));
        assert_eq!(long.to_string(), "http://[::1]/api");
        assert!(matches!(base("https://app.example"), Err(EndpointError::NeedsTls { .. })));
        for wrong in
            ["", "127.0.0.1:8000", "ftp://x", "http://", "/v1", "http://user:secret@host", "http://h/?a=b"]
        {
            assert!(matches!(base(wrong), Err(EndpointError::NotAnAddress { .. })), "{wrong}");
        }
    }

    #[test]
    fn both_variables_or_neither() {
        let guard = tempfile::tempdir().unwrap();
        let file = Utf8PathBuf::from_path_buf(guard.path().join("env")).unwrap();
        let variables = |base: Option<&str>, key: Option<&str>| {
            let (base, key) = (base.map(str::to_owned), key.map(str::to_owned));
            move |name: &str| match name {
                BASE_URL => base.clone(),
                API_KEY => key.clone(),
                _ => None,
            }
        };
        let find = |base, key| Endpoint::find(variables(base, key), &file);

        assert!(matches!(find(None, None), Err(EndpointError::Unset { .. })));
        fs::write(&file, format!("export {BASE_URL}=http://127.0.0.1:1\n")).unwrap();
        assert!(matches!(find(None, None), Err(EndpointError::Incomplete { missing: API_KEY, .. })));
        fs::write(&file, format!("export {BASE_URL}=http://127.0.0.1:1\nexport {API_KEY}={KEY}\n")).unwrap();
        assert_eq!(find(None, None).unwrap().base.port, 1);
        assert_eq!(find(Some("http://a:2"), Some(KEY)).unwrap().base.port, 2);
        assert!(matches!(find(Some("http://a:2"), None), Err(EndpointError::Half { missing: API_KEY, .. })));
        assert!(matches!(find(Some(" "), Some(KEY)), Err(EndpointError::Half { missing: BASE_URL, .. })));
        assert!(matches!(find(Some("http://a:2"), Some("x")), Err(EndpointError::Key(_))));
    }

    #[test]
    fn where_ports_are() {
        let proxy = |base, domain| Endpoint::with_proxy(base, KEY, domain).map(|endpoint| endpoint.proxy);
        for (base, domain, expected) in [
            ("http://127.0.0.1:8000", None, "localhost:8000"),
            ("http://[::1]", None, "localhost"),
            ("http://wrenn.example.com:81/api", None, "wrenn.example.com:81"),
            ("http://127.0.0.1:8000", Some("s.example.com"), "s.example.com:8000"),
            ("http://127.0.0.1:8000", Some("s.example.com:9"), "s.example.com:9"),
        ] {
            assert_eq!(proxy(base, domain).unwrap(), expected);
        }
        let wrong = proxy("http://127.0.0.1:8000", Some("http://x"));
        assert!(matches!(wrong, Err(EndpointError::ProxyDomain(_))));
    }

    #[test]
    fn a_file_of_another_user_is_not_used() {
        let guard = tempfile::tempdir().unwrap();
        let file = Utf8PathBuf::from_path_buf(guard.path().join("env")).unwrap();
        fs::write(&file, format!("export {BASE_URL}=http://127.0.0.1:1\nexport {API_KEY}={KEY}\n")).unwrap();
        // Only root can give a file away.
        if std::os::unix::fs::chown(&file, Some(65_534), None).is_ok() {
            assert!(matches!(Endpoint::from_file(&file), Err(EndpointError::Foreign { .. })));
        }
    }
}
