//! The same proxy set-up in each subject's own language.
//!
//! Envoy and Sampan get one and the same file. HAProxy and nginx get the nearest they have; what they cannot do
//! is an [`Unable`] with the reason, which the report prints.

mod envoy;
mod haproxy;
mod nginx;

use std::{net::SocketAddr, path::PathBuf};

use crate::subject::Kind;

/// What listens for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    /// HTTP/1 in plain text.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// HTTP/1 over TLS.
    Tls,
    /// Bytes.
    Tcp,
    /// HTTP/1 behind listener filters, fault, cors and header_mutation, with a route as istiod writes it and a JSON access log.
    IstioLike,
    /// HTTP/1 with one virtual host and one cluster per service: `svc-N.example.com`, N below this.
    Services(usize),
    /// Everything comes from here.
    Xds {
        /// The control plane.
        control_plane: SocketAddr,
        /// Its protocol's variant.
        delta: bool,
    },
}

/// What the backend speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upstream {
    /// HTTP/1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// Bytes.
    Tcp,
}

/// One proxy process.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Where the client connects.
    pub listen: SocketAddr,
    /// Where Envoy's admin interface is.
    pub admin: SocketAddr,
    /// The backend.
    pub backend: SocketAddr,
    /// The listener's form.
    pub front: Front,
    /// The backend's form.
    pub upstream: Upstream,
    /// Where `cert.pem`, `key.pem` and `both.pem` are, and where the configuration goes.
    pub dir: PathBuf,
}

/// Why a subject has no such set-up.
pub type Unable = &'static str;

/// The configuration file's name and text.
pub fn write(kind: Kind, setup: &Setup) -> Result<(&'static str, String), Unable> {
    match kind {
        Kind::Envoy | Kind::Sampan => Ok(("proxy.yaml", envoy::yaml(setup))),
        Kind::Haproxy => Ok(("haproxy.cfg", haproxy::cfg(setup)?)),
        Kind::Nginx => Ok(("nginx.conf", nginx::conf(setup)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup(front: Front, upstream: Upstream) -> Setup {
        let addr = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Setup { listen: addr(1), admin: addr(2), backend: addr(3), front, upstream, dir: "/d".into() }
    }

    #[test]
    fn who_cannot_says_why() {
        let chain = setup(Front::IstioLike, Upstream::Http1);
        assert!(write(Kind::Haproxy, &chain).is_err());
        assert!(write(Kind::Nginx, &chain).is_err());
        assert!(write(Kind::Nginx, &setup(Front::Tcp, Upstream::Tcp)).is_err());
        assert!(write(Kind::Nginx, &setup(Front::Http2, Upstream::Http2)).is_err());
        assert!(write(Kind::Haproxy, &setup(Front::Http2, Upstream::Http2)).is_ok());
    }

    #[test]
    fn envoy_and_sampan_get_the_same() {
        let one = setup(Front::IstioLike, Upstream::Http1);
        assert_eq!(write(Kind::Envoy, &one).unwrap(), write(Kind::Sampan, &one).unwrap());
    }

    #[test]
    fn log_has_the_contract_s_fields() {
        let (_, text) = write(Kind::Envoy, &setup(Front::IstioLike, Upstream::Http1)).unwrap();
        let fields = text.lines().skip_while(|l| !l.contains("json_format:")).skip(1);
        assert_eq!(fields.take_while(|l| l.contains(": \"%")).count(), 24);
    }

    #[test]
    fn services_are_all_there() {
        for kind in Kind::ALL {
            let (_, text) = write(kind, &setup(Front::Services(3), Upstream::Http1)).unwrap();
            for n in 0..3 {
                assert!(text.contains(&format!("svc-{n}.example.com")), "{kind:?} lacks {n}");
            }
        }
    }
}
