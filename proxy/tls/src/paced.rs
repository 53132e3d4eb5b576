//! A socket that wakes its reader seldom: a peer that sends a small message every millisecond costs a wake-up, a read and a write
//! for each, which is more than the messages' own work.
//!
//! The first reads come as soon as there is something, [`BURST`] of them at once and one more every [`PAUSE`]. Beyond that the
//! reader pauses until the next one is due, and reads what has come meanwhile. Bytes are never late by more than [`PAUSE`]. Much at once
//! ([`MUCH`]) and the peer's end are not waited for.
//!
//! While it pauses the kernel is told not to wake anybody for less (`SO_RCVLOWAT`), so that a pause costs what one wake-up costs.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use sampan_core::time::{Sleep, sleep_until};
use sampan_os::socket::set_receive_low_water;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// Between two reads, once [`BURST`] is used up.
const PAUSE: Duration = Duration::from_millis(20);
/// Reads that need not wait.
const BURST: u32 = 64;
/// As many bytes are read at once. Below the least window that a peer may be given, so that it never waits for us.
const MUCH: u16 = 32 * 1024;

/// The socket.
pub struct Paced {
    tcp: TcpStream,
    /// When the next read may be: behind now, if it need not wait.
    due: Instant,
    /// Under way while the kernel is told to be silent.
    pause: Option<Sleep>,
}

impl Paced {
    pub(crate) fn new(tcp: TcpStream) -> Self {
        Self { tcp, due: Instant::now(), pause: None }
    }

    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// All that there was has been read.
    fn drained(&mut self) {
        let now = Instant::now();
        let earliest = now.checked_sub(PAUSE * BURST).unwrap_or(now);
        self.due = self.due.max(earliest) + PAUSE;
        match &mut self.pause {
            Some(pause) => pause.reset(self.due),
            None if self.due > now && set_receive_low_water(&self.tcp, MUCH).is_ok() => {
                self.pause = Some(sleep_until(self.due));
            }
            None => {}
        }
    }

    /// Reads at the end of a pause. Ready also where nothing came: then the pauses are over.
    fn poll_paused(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(pause) = &mut self.pause
            && self.tcp.poll_read_ready(cx)?.is_pending()
        {
            ready!(Pin::new(pause).poll(cx));
        }
        if !self.read_now(buf)? {
            self.pause = None;
            set_receive_low_water(&self.tcp, 1)?;
            // What came in between woke nobody.
            self.read_now(buf)?;
        }
        Poll::Ready(Ok(()))
    }

    /// Whether there was something, if only the end. What the runtime knows of the socket is not asked: it was not told.
    fn read_now(&self, buf: &mut ReadBuf<'_>) -> io::Result<bool> {
        match rustix::io::read(&self.tcp, buf.initialize_unfilled()) {
            Ok(read) => buf.advance(read),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        // If it was told, that has been dealt with.
        let _ = self.tcp.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        Ok(true)
    }
}

impl AsyncRead for Paced {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let mut paused = this.pause.is_some();
        if paused {
            ready!(this.poll_paused(cx, buf))?;
            // The end is told as nothing while the pauses go on.
            paused = this.pause.is_some() || buf.filled().len() > before;
        }
        if !paused {
            ready!(Pin::new(&mut this.tcp).poll_read(cx, buf))?;
        }
        if buf.filled().len() > before && buf.remaining() > 0 {
            this.drained();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Paced {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().tcp).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().tcp).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use sampan_core::time::{sleep, timeout};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (Paced, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        to.set_nodelay(true).unwrap();
        (Paced::new(listener.accept().await.unwrap().0), to)
    }

    /// Reads `bytes` bytes, and tells in how many reads they came.
    async fn reads(from: &mut Paced, mut bytes: usize) -> usize {
        let (mut buf, mut reads) = ([0; 64 * 1024], 0);
        while bytes > 0 {
            bytes -= from.read(&mut buf).await.unwrap();
            reads += 1;
        }
        reads
    }

    /// Uses up what need not wait.
    async fn exhaust(from: &mut Paced, to: &mut TcpStream) {
        while from.pause.is_none() {
            to.write_all(b"x").await.unwrap();
            assert_eq!(reads(from, 1).await, 1);
        }
    }

    #[tokio::test]
    async fn little_and_often_is_read_together() {
        let (mut from, mut to) = pair().await;
        exhaust(&mut from, &mut to).await;
        let (begun, send) = (Instant::now(), async move {
            for _ in 0..200 {
                to.write_all(b"x").await.unwrap();
                sleep(Duration::from_millis(1)).await;
            }
            to
        });
        let (reads, mut to) = tokio::join!(reads(&mut from, 200), send);
        let most = begun.elapsed().as_millis() / PAUSE.as_millis() + 2;
        assert!(reads as u128 <= most, "{reads} reads in {:?}", begun.elapsed());
        // Nothing comes for a while: who sends then is heard at once.
        let mut byte = [0];
        assert!(timeout(PAUSE * 3, from.read(&mut byte)).await.is_err() && from.pause.is_none());
        to.write_all(b"y").await.unwrap();
        assert_eq!((from.read(&mut byte).await.unwrap(), byte), (1, *b"y"));
    }

    #[tokio::test]
    async fn much_and_the_end_are_not_waited_for() {
        let (mut from, mut to) = pair().await;
        exhaust(&mut from, &mut to).await;
        from.due += Duration::from_secs(3600);
        from.pause.as_mut().unwrap().reset(from.due);
        to.write_all(&vec![0; usize::from(MUCH)]).await.unwrap();
        let patience = Duration::from_secs(10);
        let mut buf = vec![0; usize::from(MUCH) * 2];
        assert_eq!(timeout(patience, from.read(&mut buf)).await.unwrap().unwrap(), usize::from(MUCH));
        assert!(from.pause.is_some());
        to.write_all(b"x").await.unwrap();
        drop(to);
        assert_eq!(timeout(patience, from.read_to_end(&mut Vec::new())).await.unwrap().unwrap(), 1);
    }
}
