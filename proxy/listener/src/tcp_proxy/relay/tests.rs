use std::cell::Cell;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};

use super::*;

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (near, listener.accept().await.unwrap().0)
}

#[derive(Default)]
struct Moved([Cell<u64>; 2]);

impl Progress for Moved {
    fn moved(&self, to: Side, bytes: usize) {
        let cell = &self.0[usize::from(to == Side::Down)];
        cell.set(cell.get() + bytes as u64);
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

/// As its caller does: both are closed behind it.
async fn relayed(mut down: Transport, mut up: Transport, moved: &Moved) -> Result<Side, Broken> {
    relay(&mut down, &mut up, moved).await
}

/// Sends `sizes` one after the other through the relay and back from an echo peer.
async fn echo_through(down: Transport, client: Transport, up: Transport, peer: Transport, sizes: &[usize]) {
    let moved = Moved::default();
    let total: usize = sizes.iter().sum();
    let (mut peer_in, mut peer_out) = tokio::io::split(peer);
    let echo = async move {
        tokio::io::copy(&mut peer_in, &mut peer_out).await.unwrap();
        peer_out.shutdown().await.unwrap();
    };
    let (mut client_in, mut client_out) = tokio::io::split(client);
    let send = async move {
        for size in sizes {
            client_out.write_all(&pattern(*size)).await.unwrap();
            tokio::task::yield_now().await;
        }
        client_out.shutdown().await.unwrap();
    };
    let expected: Vec<u8> = sizes.iter().flat_map(|s| pattern(*s)).collect();
    let receive = async move {
        let mut got = Vec::new();
        client_in.read_to_end(&mut got).await.unwrap();
        assert!(got == expected, "{} of {} bytes, or wrong ones", got.len(), expected.len());
    };
    let (ended, ..) = tokio::join!(relayed(down, up, &moved), echo, send, receive);
    assert_eq!(ended, Ok(Side::Down));
    assert_eq!(moved.0[0].get(), total as u64);
    assert_eq!(moved.0[1].get(), total as u64);
}

const SIZES: [usize; 9] = [1, 10, 3_000_000, 5, 70_000, 16_384, 1, 400_000, 7];

#[tokio::test]
async fn tcp_by_copy_and_splice() {
    for _ in 0..5 {
        let ((client, down), (up, peer)) = (tcp_pair().await, tcp_pair().await);
        let [client, down, up, peer] = [client, down, up, peer].map(Transport::Tcp);
        echo_through(down, client, up, peer, &SIZES).await;
    }
    assert!(PIPES.with_borrow(Vec::len) > 0, "splice was used and its pipes were kept");
    assert!(PIPES.with_borrow(|pipes| pipes.iter().all(|p| p.held == 0)));
}

#[tokio::test]
async fn unix_by_copy() {
    let (client, down) = UnixStream::pair().unwrap();
    let (up, peer) = tcp_pair().await;
    let (down, client) = (Transport::Unix(down), Transport::Unix(client));
    echo_through(down, client, Transport::Tcp(up), Transport::Tcp(peer), &SIZES).await;
    assert_eq!(PIPES.with_borrow(Vec::len), 0);
}

#[tokio::test]
async fn half_close_passes_on() {
    let ((mut client, down), (up, mut peer)) = (tcp_pair().await, tcp_pair().await);
    let (down, up) = (Transport::Tcp(down), Transport::Tcp(up));
    let moved = Moved::default();
    let talk = async {
        client.write_all(b"request").await.unwrap();
        client.shutdown().await.unwrap();
        let mut got = Vec::new();
        peer.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"request");
        peer.write_all(b"answer").await.unwrap();
        drop(peer);
        got.clear();
        client.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"answer");
    };
    let (ended, ()) = tokio::join!(relayed(down, up, &moved), talk);
    assert_eq!(ended, Ok(Side::Down));
}

#[tokio::test]
async fn resets_are_told_apart() {
    for side in [Side::Down, Side::Up] {
        let ((client, down), (up, peer)) = (tcp_pair().await, tcp_pair().await);
        let (mut down, mut up) = (Transport::Tcp(down), Transport::Tcp(up));
        let moved = Moved::default();
        let reset = async {
            let broken = if side == Side::Down { &client } else { &peer };
            broken.set_zero_linger().unwrap();
            if side == Side::Down { drop(client) } else { drop(peer) }
        };
        let (ended, ()) = tokio::join!(relay(&mut down, &mut up, &moved), reset);
        assert_eq!(ended, Err(Broken { side, reset: true }));
    }
}

/// A destination that does not read stops the source, and what is under way stays bounded.
#[tokio::test]
async fn back_pressure() {
    let ((mut client, down), (up, mut peer)) = (tcp_pair().await, tcp_pair().await);
    let (mut down, mut up) = (Transport::Tcp(down), Transport::Tcp(up));
    let moved = Moved::default();
    let total = 64 * 1024 * 1024;
    let send = async {
        let block = pattern(1024 * 1024);
        for _ in 0..total / block.len() {
            client.write_all(&block).await.unwrap();
        }
        client.shutdown().await.unwrap();
    };
    let receive = async {
        sampan_core::time::sleep(std::time::Duration::from_millis(200)).await;
        assert!(moved.0[0].get() < total as u64 / 2, "{} bytes were taken", moved.0[0].get());
        let mut buffer = vec![0; 1024 * 1024];
        let mut got = 0;
        while got < total {
            got += peer.read(&mut buffer).await.unwrap();
        }
        drop(peer);
    };
    let work = async { tokio::join!(send, receive) };
    let (ended, _) = tokio::join!(relay(&mut down, &mut up, &moved), work);
    assert_eq!(ended, Ok(Side::Down));
}

/// What an open connection costs while nothing moves.
#[tokio::test]
async fn idle_state_is_small() {
    let ((_client, down), (up, _peer)) = (tcp_pair().await, tcp_pair().await);
    let (mut down, mut up) = (Transport::Tcp(down), Transport::Tcp(up));
    let moved = Moved::default();
    let size = std::mem::size_of_val(&relay(&mut down, &mut up, &moved));
    assert!(size < 512, "{size} bytes");
}
