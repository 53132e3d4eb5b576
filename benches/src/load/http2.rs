//! HTTP/2 client with prior knowledge, on the `h2` crate.

use std::net::SocketAddr;

use bytes::Bytes;
use h2::client::SendRequest;

use super::connect;
use crate::error::{BenchError, Result};

/// A handle on a connection; clones share it.
#[derive(Clone)]
pub(super) struct Http2Connection {
    send: SendRequest<Bytes>,
    uri: http::Uri,
    size: usize,
}

impl Http2Connection {
    pub(super) async fn open(addr: SocketAddr, size: usize) -> Result<Self> {
        let (send, connection) = h2::client::Builder::new()
            .initial_window_size(1 << 20)
            .initial_connection_window_size(1 << 24)
            .handshake(connect(addr).await?)
            .await?;
        // Ends with the last handle; a break shows in the exchanges.
        tokio::spawn(connection);
        let uri = format!("http://bench.example.com/b/{size}")
            .parse()
            .map_err(|e| BenchError::protocol(format!("uri: {e}")))?;
        Ok(Self { send, uri, size })
    }

    pub(super) async fn exchange(&mut self) -> Result<()> {
        let mut request = http::Request::new(());
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = http::Version::HTTP_2;
        request.headers_mut().insert("user-agent", http::HeaderValue::from_static("sampan-benches"));
        request.headers_mut().insert("accept", http::HeaderValue::from_static("*/*"));
        let mut send = self.send.clone().ready().await?;
        let (response, _) = send.send_request(request, true)?;
        let response = response.await?;
        if response.status() != http::StatusCode::OK {
            return Err(BenchError::protocol(format!("status {}", response.status())));
        }
        let mut body = response.into_body();
        let mut have = 0;
        while let Some(data) = body.data().await {
            let data = data?;
            have += data.len();
            body.flow_control().release_capacity(data.len())?;
        }
        if have != self.size {
            return Err(BenchError::protocol(format!("answer of {have} bytes, not {}", self.size)));
        }
        Ok(())
    }
}
