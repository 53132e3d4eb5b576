//! Plain TCP against the backend's "ask for N bytes" protocol.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::connect;
use crate::error::{BenchError, Result};

/// Bytes that a short connection asks for.
const SHORT: u64 = 64;

/// Asks for `n` bytes and reads them all.
pub(super) async fn fetch(stream: &mut TcpStream, n: u64) -> Result<()> {
    stream.write_u64(n).await.map_err(BenchError::io("ask"))?;
    let mut buf = vec![0; usize::try_from(n).unwrap_or(usize::MAX).min(256 * 1024)];
    let mut left = n;
    while left > 0 {
        let got = stream.read(&mut buf).await.map_err(BenchError::io("fetch"))? as u64;
        if got == 0 || got > left {
            return Err(BenchError::protocol(format!("{left} of {n} bytes left, then {got}")));
        }
        left -= got;
    }
    Ok(())
}

/// A whole short connection. The client ends it and waits for the proxy's end, so that the proxy's work for a
/// close is part of the figure.
pub(super) async fn once(addr: SocketAddr) -> Result<()> {
    let mut stream = connect(addr).await?;
    fetch(&mut stream, SHORT).await?;
    stream.shutdown().await.map_err(BenchError::io("shutdown"))?;
    match stream.read(&mut [0; 1]).await {
        Ok(0) => Ok(()),
        Ok(_) => Err(BenchError::protocol("bytes after the end")),
        Err(e) => Err(BenchError::Io { what: "end".into(), source: e }),
    }
}
