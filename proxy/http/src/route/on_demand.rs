//! What a stream says to whoever keeps a table whose virtual hosts come when they are asked for (VHDS).

use envoy_types::pb::envoy::config::route::v3::Vhds;
use sampan_core::config_source::{Api, ConfigSource, SourceKind};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use tokio::sync::{mpsc, oneshot};

/// Where hosts come from: ADS, which must be delta, or a delta stream of its own.
pub fn hosts_source(message: &Vhds) -> ConfigResult<ConfigSource> {
    const DELTA: &str =
        "vhds: only 'DELTA_GRPC' or 'ADS' (which uses Delta xDS) is supported as a config source.";
    let source = message.config_source.as_ref().ok_or_else(|| ConfigError::missing("config_source"));
    let source = source.and_then(|s| ConfigSource::from_proto(s).at("config_source")).at("vhds")?;
    match &source.kind {
        SourceKind::Ads => Ok(source),
        SourceKind::Api(api) if matches!(api.api, Api::Grpc { delta: true, .. }) => Ok(source),
        _ => Err(ConfigError::new(DELTA)),
    }
}

/// A host that a stream waits for.
pub struct Demand {
    /// The authority, in lower case.
    pub host: String,
    /// Told when the table in force is the answer, whether or not it knows the host. Dropped: there will be none.
    pub answer: oneshot::Sender<()>,
}

/// Where to ask for a table's hosts.
#[derive(Clone, Debug)]
pub struct HostsOnDemand(mpsc::UnboundedSender<Demand>);

impl HostsOnDemand {
    /// A place to ask and where the questions come out.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Demand>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// Asks; what is returned ends with the answer.
    pub fn ask(&self, authority: &[u8]) -> impl Future<Output = ()> + use<> {
        let (answer, answered) = oneshot::channel();
        let host = String::from_utf8_lossy(authority).to_ascii_lowercase();
        // Where nobody listens any more the answer is dropped at once.
        let _ = self.0.send(Demand { host, answer });
        async move {
            let _ = answered.await;
        }
    }
}
