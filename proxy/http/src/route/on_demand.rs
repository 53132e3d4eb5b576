//! What a stream says to whoever keeps a table whose virtual hosts come when they are asked for (VHDS).

use tokio::sync::{mpsc, oneshot};

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
