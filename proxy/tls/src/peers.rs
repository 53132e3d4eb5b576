//! What a finished handshake tells, with the facts of the peer's certificates made once per certificate.
//!
//! In a mesh a few peers open many connections: the facts of their chains are kept by hash, so that a connection
//! costs a look-up instead of parsing, and connections share them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::digest;
use rustls::CommonState;
use rustls::pki_types::CertificateDer;
use sampan_core::stream_info::{CertInfo, TlsInfo, UrlPem};

use crate::cert_info::cert_info;
use crate::stats::{cipher_name, curve_name, version_name};

/// How many chains a context remembers; past it the memory begins anew.
const CAPACITY: usize = 256;

/// The facts of a peer's chain.
#[derive(Debug, Clone)]
struct Peer {
    leaf: Arc<CertInfo>,
    issuers: Vec<Arc<CertInfo>>,
    chain_pem: Arc<UrlPem>,
}

/// The chains seen by one context.
#[derive(Debug, Default)]
pub(crate) struct Peers(Mutex<HashMap<[u8; 32], Peer>>);

impl Peers {
    fn get(&self, chain: &[CertificateDer<'_>]) -> Option<Peer> {
        let (leaf, rest) = chain.split_first()?;
        let mut hash = digest::Context::new(&digest::SHA256);
        for der in chain {
            hash.update(&(der.len() as u64).to_be_bytes());
            hash.update(der);
        }
        let key = <[u8; 32]>::try_from(hash.finish().as_ref()).ok()?;
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = peers.get(&key) {
            return Some(peer.clone());
        }
        let peer = Peer {
            leaf: Arc::new(cert_info(leaf)),
            issuers: rest.iter().map(|der| Arc::new(cert_info(der))).collect(),
            chain_pem: Arc::new(UrlPem::new(chain.iter().map(|der| der.as_ref()))),
        };
        if peers.len() >= CAPACITY {
            peers.clear();
        }
        peers.insert(key, peer.clone());
        Some(peer)
    }

    /// The facts of a connection.
    pub(crate) fn tls_info(
        &self,
        connection: &CommonState,
        sni: Option<&str>,
        local: Option<Arc<CertInfo>>,
        peer_validated: bool,
    ) -> TlsInfo {
        let peer = connection.peer_certificates().and_then(|chain| self.get(chain));
        let mut info = TlsInfo {
            version: connection.protocol_version().map_or("", version_name),
            cipher: connection.negotiated_cipher_suite().map_or("", |s| cipher_name(s.suite())),
            group: connection.negotiated_key_exchange_group().map_or("", |g| curve_name(g.name())),
            alpn: connection.alpn_protocol().map(|p| String::from_utf8_lossy(p).as_ref().into()),
            sni: sni.map(Into::into),
            peer_validated,
            local,
            ..TlsInfo::default()
        };
        if let Some(peer) = peer {
            info.peer = Some(peer.leaf);
            info.peer_issuers = peer.issuers;
            info.peer_chain_pem = Some(peer.chain_pem);
        }
        info
    }
}
