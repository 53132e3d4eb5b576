//! The control plane of a case: what the bootstrap says of it, what it serves, and ([`Peer`]) a process of
//! `tests/peers/go-control-plane` for each subject, which knows what it was asked.
//!
//! `control_plane: {mode: ads, resources: […]}` starts one that serves the resources (in the words of [`crate::xds`]) and lays over
//! the bootstrap a node, the static cluster `xds_cluster` and `dynamic_resources`. The text `$control_plane` anywhere in the
//! configuration or in a resource becomes the ConfigSource that leads to it in the case's mode.
//!
//! Requests are observed by type, in order. Their nonces depend on how the types interleave, so that a request says instead
//! which response of its type and stream it `answers`.

mod peer;

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::config;
use crate::error::{Error, Result};
use crate::names::Names;
use crate::xds;

pub use peer::{Peer, silent};

/// The name of the static cluster.
const CLUSTER: &str = "xds_cluster";
/// How long something that is waited for may take.
pub(crate) const SETTLE: Duration = Duration::from_secs(3);

/// How the proxy asks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One stream, state of the world.
    #[default]
    Ads,
    /// One stream, delta.
    DeltaAds,
    /// A stream for each type, state of the world.
    Xds,
    /// A stream for each type, delta.
    Delta,
    /// Polling.
    Rest,
}

/// A case's control plane.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlPlane {
    /// How the proxy asks.
    #[serde(default)]
    pub mode: Mode,
    /// Version of the first snapshot.
    #[serde(default = "one")]
    pub version: String,
    /// The first snapshot: whole resources, or the words of [`crate::xds`].
    #[serde(default)]
    pub resources: Vec<Value>,
    /// What the bootstrap subscribes to; what is in `resources` of `cds` and `lds` when absent.
    pub types: Option<Vec<String>>,
    /// Over TLS; `mutual` demands the certificate `client`.
    pub tls: Option<Tls>,
    /// Over a unix socket.
    #[serde(default)]
    pub unix: bool,
    /// Endpoints come from a cache of their own, one by one.
    #[serde(default)]
    pub mux: bool,
    /// Renew resources with a TTL so often, in milliseconds.
    pub heartbeat_ms: Option<u64>,
    /// Laid over the ApiConfigSource.
    #[serde(default)]
    pub api: Map<String, Value>,
    /// Laid over each ConfigSource that leads to the control plane.
    #[serde(default)]
    pub source: Map<String, Value>,
    /// Trouble from the start.
    pub trouble: Option<Map<String, Value>>,
    /// The process starts with the case; otherwise with a step.
    #[serde(default = "yes")]
    pub running: bool,
    /// Wait until the subject is ready; otherwise only until its admin interface answers.
    #[serde(default = "yes")]
    pub ready: bool,
}

/// TLS between proxy and control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tls {
    /// The server shows a certificate.
    Server,
    /// Both do.
    Mutual,
}

fn one() -> String {
    "1".into()
}
fn yes() -> bool {
    true
}

/// What a step `control_plane` does.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// Starts the process.
    Start,
    /// Ends the process.
    Stop,
    /// Both, on the same ports and with the same snapshot.
    Restart,
    /// Ends every open stream.
    Close,
    /// Ends the trouble.
    Calm,
    /// From now on each response is in trouble: `hang`, `close`, `garbage`, `malformed`, `refuse`, `repeat`, `delay_ms`, `types`.
    Trouble(Map<String, Value>),
    /// A response that nobody asked for: `type`, `version`, `nonce`, `resources` (null: none), `names`, `versions`, `ttls`, `aliases`,
    /// `removed`, `type_url`.
    Send(Map<String, Value>),
    /// What the load reporting service answers from now on: a LoadStatsResponse.
    LoadStats(Map<String, Value>),
}

impl ControlPlane {
    /// Lays what leads to the control plane over the bootstrap.
    pub fn announce(&self, bootstrap: &mut Value) -> Result<()> {
        let mut cluster =
            json!({ "host": "127.0.0.1", "endpoints": ["{{control_plane}}"], "connect_timeout": "1s" });
        if self.mode != Mode::Rest {
            cluster["http2"] = true.into();
        }
        if let Some(tls) = self.tls {
            let mut context = json!({ "sni": "server.test", "common_tls_context": {
                "validation_context": { "trusted_ca": { "filename": "{{certs}}/ca.pem" } } } });
            if tls == Tls::Mutual {
                context["common_tls_context"]["tls_certificates"] = json!([{
                    "certificate_chain": { "filename": "{{certs}}/client.pem" },
                    "private_key": { "filename": "{{certs}}/client.key" },
                }]);
            }
            cluster["tls"] = context;
        }
        let mut cluster = config::qualified(config::cluster(CLUSTER, cluster)?)?;
        if self.unix {
            cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"] =
                json!({ "pipe": { "path": "{{dir}}/xds" } });
        }
        let mut with = json!({ "node": { "id": "node", "cluster": "cluster" } });
        if matches!(self.mode, Mode::Ads | Mode::DeltaAds) {
            with["dynamic_resources"]["ads_config"] = self.api();
        }
        for kind in self.subscribed() {
            with["dynamic_resources"][format!("{kind}_config")] = self.source();
        }
        let given = std::mem::replace(bootstrap, with);
        config::merge(bootstrap, given);
        let clusters = bootstrap["static_resources"]["clusters"].as_array_mut();
        clusters.ok_or_else(|| Error::Case("no static clusters".into()))?.push(cluster);
        self.sources(bootstrap);
        Ok(())
    }

    fn subscribed(&self) -> Vec<&str> {
        match &self.types {
            Some(types) => types.iter().map(String::as_str).collect(),
            None => [("cds", "cluster"), ("lds", "listener")]
                .into_iter()
                .filter(|(_, word)| self.resources.iter().any(|r| r.get(word).is_some()))
                .map(|(kind, _)| kind)
                .collect(),
        }
    }

    fn api(&self) -> Value {
        let mut api = match self.mode {
            Mode::Rest => json!({
                "api_type": "REST", "cluster_names": [CLUSTER], "refresh_delay": "0.1s", "request_timeout": "1s",
            }),
            mode => {
                let delta = matches!(mode, Mode::DeltaAds | Mode::Delta);
                json!({
                    "api_type": if delta { "DELTA_GRPC" } else { "GRPC" },
                    "grpc_services": [{ "envoy_grpc": { "cluster_name": CLUSTER } }],
                })
            }
        };
        api["transport_api_version"] = "V3".into();
        config::merge(&mut api, self.api.clone().into());
        api
    }

    fn source(&self) -> Value {
        let mut source = match self.mode {
            Mode::Ads | Mode::DeltaAds => json!({ "ads": {} }),
            _ => json!({ "api_config_source": self.api() }),
        };
        source["resource_api_version"] = "V3".into();
        config::merge(&mut source, self.source.clone().into());
        source
    }

    /// Puts the ConfigSource in the place of `$control_plane`.
    fn sources(&self, tree: &mut Value) {
        match tree {
            Value::String(text) if text == "$control_plane" => *tree = self.source(),
            Value::Array(items) => items.iter_mut().for_each(|v| self.sources(v)),
            Value::Object(map) => map.values_mut().for_each(|v| self.sources(v)),
            _ => {}
        }
    }

    /// A snapshot as the process takes it.
    fn snapshot(&self, given: Map<String, Value>, names: &Names) -> Result<Value> {
        let mut parts = given;
        let mut list = config::array(parts.remove("resources"), "resources")?
            .into_iter()
            .map(xds::resource)
            .collect::<Result<Value>>()?;
        self.sources(&mut list);
        let list = names.fill_tree(&config::qualified(list)?)?;
        let mut whole = json!({ "resources": list });
        for word in ["version", "versions"] {
            if let Some(value) = parts.remove(word) {
                whole[word] = value;
            }
        }
        config::nothing_left(&parts, "a snapshot")?;
        Ok(whole)
    }
}
