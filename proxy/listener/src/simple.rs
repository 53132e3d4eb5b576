//! The two network filters that need no upstream: `echo` and `direct_response`.

use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::extensions::filters::network::direct_response::v3::Config;
use envoy_types::pb::google::protobuf::Any;
use futures_util::future::LocalBoxFuture;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::context::{FactoryContext, Worker};
use crate::network::{Downstream, NetworkFilter, NetworkFilterRegistry, TerminalFilter};
use crate::proto::decode;

/// Registers both.
pub(crate) fn register(registry: &mut NetworkFilterRegistry) {
    registry.register("envoy.extensions.filters.network.echo.v3.Echo", |_, _| {
        Ok(NetworkFilter::Terminal(Arc::new(Echo)))
    });
    registry.register("envoy.extensions.filters.network.direct_response.v3.Config", direct_response);
}

/// Sends back what comes.
struct Echo;

impl TerminalFilter for Echo {
    fn serve(self: Arc<Self>, downstream: Downstream, _worker: Rc<Worker>) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            let mut downstream = downstream;
            let mut buffer = vec![0; 16 * 1024];
            while let Ok(n @ 1..) = downstream.transport.read(&mut buffer).await {
                let sent = async {
                    downstream.transport.write_all(&buffer[..n]).await?;
                    downstream.transport.flush().await
                };
                if sent.await.is_err() {
                    return;
                }
            }
            // The peer may already be gone; the connection ends here anyway.
            let _ = downstream.transport.shutdown().await;
        })
    }
}

/// Sends its response and closes.
struct DirectResponse(Bytes);

fn direct_response(config: &Any, _context: &FactoryContext) -> ConfigResult<NetworkFilter> {
    let message: Config = decode(config)?;
    let body = message.response.as_ref().map(data_source).transpose().at("response")?.unwrap_or_default();
    Ok(NetworkFilter::Terminal(Arc::new(DirectResponse(body))))
}

fn data_source(source: &DataSource) -> ConfigResult<Bytes> {
    match &source.specifier {
        Some(Specifier::InlineString(s)) => Ok(s.clone().into()),
        Some(Specifier::InlineBytes(b)) => Ok(b.clone().into()),
        Some(Specifier::Filename(path)) => match std::fs::read(path) {
            Ok(bytes) => Ok(bytes.into()),
            Err(_) => Err(ConfigError::new(format!("unable to read file: {path}")).at("filename")),
        },
        Some(Specifier::EnvironmentVariable(name)) => match std::env::var(name) {
            Ok(value) => Ok(value.into()),
            Err(_) => Err(ConfigError::new(format!("Environment variable doesn't exist: {name}"))
                .at("environment_variable")),
        },
        None => Err(ConfigError::missing("specifier")),
    }
}

impl TerminalFilter for DirectResponse {
    fn serve(self: Arc<Self>, downstream: Downstream, _worker: Rc<Worker>) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            let mut downstream = downstream;
            // Whether the peer still reads makes no difference to what happens next.
            if downstream.transport.write_all(&self.0).await.is_ok() {
                let _ = downstream.transport.shutdown().await;
            }
        })
    }
}
