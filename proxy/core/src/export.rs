//! Records on their way to a collector: access log entries and spans.
//!
//! A record is encoded where it is made, into the batch that the calling thread has for its [`Exporter`]; nothing is locked. A
//! batch is sent when it has grown past its limit, and an interval after its first record at the latest. Who sends is the
//! thread's [`Uplink`], installed by whoever has clusters. The request path never waits: while there is no host, or the collector
//! takes no more, the batch stays as it is, and what does not fit into it is dropped and counted.
//!
//! As in Envoy, what was handed to a stream that breaks, or to a call that fails, is lost: log records are not sent twice. A
//! stream that broke is opened anew with the next batch.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};

mod exporters;

use crate::config_source::GrpcService;
use crate::http_service::HttpService;
use crate::runtime::Runtime;
use crate::stats::Counter;

pub use exporters::{Exporters, Kind};

/// Calls of a thread to its clusters.
pub trait Uplink {
    /// Begins a call of many messages; none where there is no host. What goes wrong later shows in [`Outflow::is_open`].
    fn stream(&self, service: &Arc<GrpcService>, path: &'static str) -> Option<Box<dyn Outflow>>;

    /// A call of one message; the answer's message, or the gRPC status that it failed with.
    fn unary(&self, service: &Arc<GrpcService>, path: &'static str, message: Bytes) -> Answer;

    /// A POST, and what came of it.
    fn post(&self, service: &Arc<HttpService>, body: Bytes, timeout: Duration) -> PostAnswer;
}

/// What a call of one message ends with.
pub type Answer = Pin<Box<dyn Future<Output = Result<Bytes, u16>>>>;

/// What a POST ends with.
pub type PostAnswer = Pin<Box<dyn Future<Output = Posted>>>;

/// What came of a POST.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Posted {
    /// Its status: 503 where no host answered, 504 where it was too slow, as Envoy's client has it.
    Status(u16),
    /// The answer broke off.
    Broken,
    /// There is no such cluster.
    NoCluster,
}

/// A call of many messages under way. Dropping it ends it.
pub trait Outflow {
    /// Whether it still goes on.
    fn is_open(&self) -> bool;

    /// Whether the collector is so far behind that nothing more should be sent.
    fn is_full(&self) -> bool;

    /// Sends a message, in its frame.
    fn send(&self, frame: Bytes);
}

/// How records make a body.
#[derive(Debug)]
pub enum Shape {
    /// A message.
    Message {
        /// Its fields from the outside in, each with the encoded fields that stand before its content.
        levels: Vec<(u32, Bytes)>,
        /// The records' field number, in the innermost.
        record: u32,
    },
    /// A list in JSON.
    Json,
}

/// What is done with batches.
pub struct Exporter {
    id: u64,
    plan: Arc<Plan>,
    alive: Arc<()>,
}

/// The settings of an exporter.
pub struct Plan {
    /// How batches go out.
    pub way: Way,
    /// What they look like.
    pub shape: Shape,
    /// A batch goes out after so many milliseconds at the latest.
    pub interval: Setting,
    /// A batch goes out when it holds so many bytes.
    pub limit: usize,
    /// A batch goes out when it holds so many records; none: whatever their number.
    pub records: Option<Setting>,
    /// A batch holds so many records at most; what comes then is counted, and lost.
    pub most: Option<(u64, Counter)>,
    /// Counts the records of batches that went out.
    pub sent: Option<Counter>,
    /// Counts the batches whose time had come.
    pub timed: Option<Counter>,
}

/// To whom, and how.
pub enum Way {
    /// A gRPC stream that stays open.
    Stream {
        /// Whose.
        service: Arc<GrpcService>,
        /// The method.
        path: &'static str,
        /// The encoded fields that stand before the first message's content.
        first: Bytes,
    },
    /// A gRPC call for each batch.
    Call {
        /// Whose.
        service: Arc<GrpcService>,
        /// The method.
        path: &'static str,
        /// Is told how many records were sent and what came of it.
        done: Done<Result<Bytes, u16>>,
    },
    /// A POST for each batch.
    Post {
        /// Whose.
        service: Arc<HttpService>,
        /// How many milliseconds it may take.
        timeout: Setting,
        /// Is told how many records were sent and what came of it.
        done: Done<Posted>,
    },
}

/// Who is told of a batch's end.
pub type Done<T> = Box<dyn Fn(u32, T) + Send + Sync>;

/// A number that may be found in the runtime.
pub enum Setting {
    /// This.
    Fixed(u64),
    /// What stands under the key; this where nothing does.
    Runtime(Runtime, &'static str, u64),
}

impl Setting {
    fn get(&self) -> u64 {
        match self {
            Self::Fixed(number) => *number,
            Self::Runtime(runtime, key, usual) => runtime.integer(key, *usual),
        }
    }
}

thread_local! {
    static UPLINK: RefCell<Option<Rc<dyn Uplink>>> = const { RefCell::new(None) };
    static BATCHES: RefCell<Vec<Own>> = const { RefCell::new(Vec::new()) };
}

/// Gives the calling thread its way out.
pub fn install(uplink: Rc<dyn Uplink>) {
    UPLINK.set(Some(uplink));
}

/// The calling thread's batch of an exporter, and whether that is still there.
type Own = (u64, Weak<()>, Rc<Batch>);

struct Batch {
    plan: Arc<Plan>,
    buffer: RefCell<Vec<u8>>,
    count: Cell<u32>,
    /// The timer runs.
    armed: Cell<bool>,
    stream: RefCell<Option<Box<dyn Outflow>>>,
}

impl Exporter {
    /// An exporter; its batches are made at first use.
    pub fn new(plan: Plan) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), plan: Arc::new(plan), alive: Arc::default() }
    }

    /// Adds a record to the calling thread's batch; false where it was dropped because there is no room.
    pub fn push(&self, record: &impl Message) -> bool {
        self.add(|shape, buffer| {
            if let Shape::Message { record: number, .. } = shape {
                encode_key(*number, WireType::LengthDelimited, &mut *buffer);
                encode_varint(record.encoded_len() as u64, &mut *buffer);
                record.encode_raw(buffer);
            }
        })
    }

    /// Adds a record in JSON.
    pub fn push_json(&self, record: &[u8]) -> bool {
        self.add(|_, buffer| {
            buffer.extend_from_slice(if buffer.is_empty() { b"[" } else { b"," });
            buffer.extend_from_slice(record);
        })
    }

    fn add(&self, write: impl FnOnce(&Shape, &mut Vec<u8>)) -> bool {
        let Some(uplink) = UPLINK.with_borrow(Clone::clone) else { return false };
        self.batch().add(write, &uplink)
    }

    fn batch(&self) -> Rc<Batch> {
        BATCHES.with_borrow_mut(|all| {
            if let Some((.., batch)) = all.iter().find(|(id, ..)| *id == self.id) {
                return batch.clone();
            }
            // Batches of exporters that are gone; what they hold goes out with their timer.
            all.retain(|(_, exporter, _)| exporter.strong_count() > 0);
            let batch = Rc::new(Batch {
                plan: self.plan.clone(),
                buffer: RefCell::default(),
                count: Cell::new(0),
                armed: Cell::new(false),
                stream: RefCell::default(),
            });
            all.push((self.id, Arc::downgrade(&self.alive), batch.clone()));
            batch
        })
    }
}

impl Batch {
    fn is_over_limit(&self) -> bool {
        self.buffer.borrow().len() >= self.plan.limit
            || self.plan.records.as_ref().is_some_and(|records| u64::from(self.count.get()) >= records.get())
    }

    fn add(self: &Rc<Self>, write: impl FnOnce(&Shape, &mut Vec<u8>), uplink: &Rc<dyn Uplink>) -> bool {
        if let Some((most, dropped)) = &self.plan.most
            && u64::from(self.count.get()) >= *most
        {
            dropped.inc();
            self.flush(uplink);
            return false;
        }
        if self.count.get() > 0 && self.is_over_limit() {
            self.flush(uplink);
            if self.count.get() > 0 {
                return false;
            }
        }
        write(&self.plan.shape, &mut self.buffer.borrow_mut());
        self.count.set(self.count.get() + 1);
        if self.is_over_limit() {
            self.flush(uplink);
        }
        if self.count.get() > 0 && !self.armed.replace(true) {
            let (batch, uplink) = (self.clone(), uplink.clone());
            tokio::task::spawn_local(async move {
                // A batch that its collector does not take yet is offered again and again.
                while batch.count.get() > 0 {
                    let interval = Duration::from_millis(batch.plan.interval.get().max(1));
                    crate::time::sleep(interval).await;
                    if let Some(timed) = &batch.plan.timed {
                        timed.inc();
                    }
                    batch.flush(&uplink);
                }
                batch.armed.set(false);
            });
        }
        true
    }

    fn flush(&self, uplink: &Rc<dyn Uplink>) {
        if self.count.get() == 0 {
            return;
        }
        let (plan, count) = (&self.plan, self.count.get());
        match &plan.way {
            Way::Stream { service, path, first } => {
                let mut stream = self.stream.borrow_mut();
                let begins = !stream.as_ref().is_some_and(|stream| stream.is_open());
                if begins {
                    *stream = uplink.stream(service, path);
                }
                if let Some(stream) = stream.as_ref().filter(|stream| !stream.is_full()) {
                    stream.send(self.take(if begins { first } else { b"" }));
                }
            }
            Way::Call { service, path, .. } => {
                let (answer, plan) = (uplink.unary(service, path, self.take(b"")), plan.clone());
                tokio::task::spawn_local(async move {
                    let answer = answer.await;
                    if let Way::Call { done, .. } = &plan.way {
                        done(count, answer);
                    }
                });
            }
            Way::Post { service, timeout, .. } => {
                let timeout = Duration::from_millis(timeout.get());
                let (answer, plan) = (uplink.post(service, self.take(b""), timeout), plan.clone());
                tokio::task::spawn_local(async move {
                    let answer = answer.await;
                    if let Way::Post { done, .. } = &plan.way {
                        done(count, answer);
                    }
                });
            }
        }
    }

    /// The batch as a body, in a gRPC frame where it goes out by gRPC. The buffer is empty then, and as large as it was.
    fn take(&self, first: &[u8]) -> Bytes {
        let mut records = self.buffer.borrow_mut();
        if let Some(sent) = &self.plan.sent {
            sent.add(self.count.get().into());
        }
        let framed = !matches!(self.plan.way, Way::Post { .. });
        let body = match &self.plan.shape {
            Shape::Message { levels, .. } => message(framed, first, levels, &records),
            Shape::Json => [records.as_slice(), b"]"].concat().into(),
        };
        records.clear();
        self.count.set(0);
        body
    }
}

/// A message: `first`, then the records in the fields around them.
fn message(framed: bool, first: &[u8], levels: &[(u32, Bytes)], records: &[u8]) -> Bytes {
    // From the inside out: what each level holds.
    let mut sizes = Vec::with_capacity(levels.len());
    let mut size = records.len();
    for (number, before) in levels.iter().rev() {
        let inner = before.len() + size;
        sizes.push(inner);
        size = inner + prost::encoding::key_len(*number) + prost::encoding::encoded_len_varint(inner as u64);
    }
    let length = first.len() + size;
    let mut out = Vec::with_capacity(5 + length);
    if framed {
        out.push(0);
        out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    }
    out.extend_from_slice(first);
    for ((number, before), inner) in levels.iter().zip(sizes.iter().rev()) {
        encode_key(*number, WireType::LengthDelimited, &mut out);
        encode_varint(*inner as u64, &mut out);
        out.extend_from_slice(before);
    }
    out.extend_from_slice(records);
    out.into()
}

/// A deadline as a setting has it.
pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A message as the field of another.
pub fn field(number: u32, message: &impl Message) -> Bytes {
    let mut out = Vec::new();
    prost::encoding::message::encode(number, message, &mut out);
    out.into()
}

#[cfg(test)]
#[path = "export/tests.rs"]
mod tests;
