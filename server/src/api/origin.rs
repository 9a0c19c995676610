//! Where a request comes from when a browser sends it for a page: under which name it reached this machine, and from
//! which origin's page.
//!
//! A browser protects a server from pages of other origins as long as those have another name. A page whose own name
//! comes to mean this machine (DNS rebinding) has not: what gives it away is the name, in `Host`.

use std::net::IpAddr;

use axum::extract::Request;
use axum::http::header;

/// The names that a server may be asked under, besides addresses and `localhost`, which no page from elsewhere can have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts {
    any: bool,
    names: Vec<String>,
}

impl Hosts {
    /// For a server that listens at `address`. Where others reach it too and no name is given, any will do: it is then up
    /// to keys who may ask. The name `*` is any.
    #[must_use]
    pub fn new(address: IpAddr, names: &[String]) -> Self {
        let any = names.iter().any(|name| name == "*") || names.is_empty() && !address.to_canonical().is_loopback();
        Self { any, names: names.to_vec() }
    }

    /// Whether a request asks under one of them. Browsers always say a name; programs that say none may pass.
    pub(super) fn allow(&self, request: &Request) -> bool {
        self.any || authorities(request).all(|authority| authority.is_some_and(|authority| self.has(authority)))
    }

    fn has(&self, authority: &str) -> bool {
        let (host, port) = match authority.rsplit_once(':') {
            // The colons of an address of version 6 stand in brackets.
            Some((host, port)) if !port.contains(']') => (host, port),
            _ => (authority, ""),
        };
        if !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return false;
        }
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        if bracketed.unwrap_or(host).parse::<IpAddr>().is_ok_and(|address| address.is_ipv6() == bracketed.is_some()) {
            return true;
        }
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        host == "localhost"
            || host.ends_with(".localhost")
            || self.names.iter().any(|name| name.eq_ignore_ascii_case(&host))
    }
}

/// What a request says that it was sent to; `None` for what is no text.
fn authorities(request: &Request) -> impl Iterator<Item = Option<&str>> {
    let named = request.uri().authority().map(|authority| Some(authority.as_str()));
    named.into_iter().chain(request.headers().get_all(header::HOST).iter().map(|value| value.to_str().ok()))
}

/// Whether a browser sends this on behalf of a page from elsewhere. It would not let that page read the answer, but the
/// work would be done.
pub(super) fn is_foreign(request: &Request) -> bool {
    let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    match header("sec-fetch-site") {
        Some(site) => matches!(site, "cross-site" | "same-site"),
        // Browsers that do not say it name the page's origin where it matters.
        None => header("origin").is_some_and(|origin| {
            let page = origin.split_once("://").map(|(_, authority)| authority);
            let mut names = authorities(request).peekable();
            page.is_none() || names.peek().is_none() || names.any(|name| name != page)
        }),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn asks(hosts: &Hosts, host: &str) -> bool {
        hosts.allow(&Request::builder().header("host", host).body(Body::empty()).unwrap())
    }

    #[test]
    fn a_local_server_is_asked_by_address_or_as_localhost_or_under_a_name_that_it_was_told() {
        let local = Hosts::new("127.0.0.1".parse().unwrap(), &["chat.example.org".to_owned()]);
        for host in [
            "127.0.0.1",
            "127.0.0.1:8080",
            "192.168.0.7:80",
            "[::1]",
            "[::1]:8080",
            "localhost",
            "LOCALHOST:8080",
            "localhost.",
            "a.localhost",
            "chat.example.org",
            "Chat.Example.Org.:443",
        ] {
            assert!(asks(&local, host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8080",
            "",
            ":8080",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evillocalhost",
            "example.org",
            "a.chat.example.org",
            "127.0.0.1:evil.example",
            "[evil.example]",
            "::1",
            "evil.example:[::1]",
            "user@127.0.0.1",
            "[127.0.0.1]",
            "127.0.0.1, evil.example",
        ] {
            assert!(!asks(&local, host), "{host}");
        }
    }

    #[test]
    fn every_name_that_a_request_says_counts() {
        let local = Hosts::new("::1".parse().unwrap(), &[]);
        let request = |uri: &str, hosts: &[&str]| {
            let builder = hosts.iter().fold(Request::builder().uri(uri), |builder, host| builder.header("host", *host));
            local.allow(&builder.body(Body::empty()).unwrap())
        };
        assert!(request("/", &[]));
        assert!(request("http://localhost/", &["localhost"]));
        assert!(!request("/", &["localhost", "evil.example"]));
        assert!(!request("http://evil.example/", &["localhost"]));
    }

    #[test]
    fn names_are_looked_at_only_where_they_are_known() {
        let (inside, outside) = ("127.0.0.1".parse().unwrap(), "0.0.0.0".parse().unwrap());
        let named = ["a.example".to_owned()];
        assert!(!asks(&Hosts::new(inside, &[]), "b.example"));
        assert!(asks(&Hosts::new(outside, &[]), "b.example"));
        assert!(!asks(&Hosts::new(outside, &named), "b.example"));
        assert!(asks(&Hosts::new(outside, &named), "A.example"));
        assert!(asks(&Hosts::new(inside, &["*".to_owned()]), "b.example"));
    }
}
