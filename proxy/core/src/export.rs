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

use crate::config_source::GrpcService;
use crate::runtime::Runtime;

/// Calls of a thread to its clusters.
pub trait Uplink {
    /// Begins a call of many messages; none where there is no host. What goes wrong later shows in [`Outflow::is_open`].
    fn stream(&self, service: &Arc<GrpcService>, path: &'static str) -> Option<Box<dyn Outflow>>;

    /// A call of one message; the answer's message, or the gRPC status that it failed with.
    fn unary(&self, service: &Arc<GrpcService>, path: &'static str, message: Bytes) -> Answer;
}

/// What a call of one message ends with.
pub type Answer = Pin<Box<dyn Future<Output = Result<Bytes, u16>>>>;

/// A call of many messages under way. Dropping it ends it.
pub trait Outflow {
    /// Whether it still goes on.
    fn is_open(&self) -> bool;

    /// Whether the collector is so far behind that nothing more should be sent.
    fn is_full(&self) -> bool;

    /// Sends a message, in its frame.
    fn send(&self, frame: Bytes);
}

/// How records make a message: the message's fields from the outside in, each with what stands in it before the next; the
/// records are the field `record` of the innermost.
#[derive(Debug, Default)]
pub struct Shape {
    /// Number of each nested field, and the encoded fields that stand before its content.
    pub levels: Vec<(u32, Bytes)>,
    /// The records' field number.
    pub record: u32,
}

/// What is done with batches.
pub struct Exporter {
    id: u64,
    plan: Arc<Plan>,
    alive: Arc<()>,
}

/// The settings of an exporter.
pub struct Plan {
    /// The method.
    pub path: &'static str,
    /// Whose.
    pub service: Arc<GrpcService>,
    /// How.
    pub call: CallKind,
    /// The message.
    pub shape: Shape,
    /// A batch goes out after so many milliseconds at the latest.
    pub interval: Setting,
    /// A batch goes out when it holds so many bytes.
    pub limit: usize,
    /// A batch goes out when it holds so many records; 0: whatever their number.
    pub records: Setting,
}

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

/// A stream that stays open, or a call for each batch.
pub enum CallKind {
    /// The encoded fields that stand before the first message's content.
    Stream(Bytes),
    /// Who is told how many records were sent and what came of it.
    Unary(Box<dyn Fn(u32, Result<Bytes, u16>) + Send + Sync>),
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
        let Some(uplink) = UPLINK.with_borrow(Clone::clone) else { return false };
        self.batch().push(record, &uplink)
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
        let records = || Some(self.plan.records.get()).filter(|records| *records > 0);
        self.buffer.borrow().len() >= self.plan.limit
            || records().is_some_and(|records| u64::from(self.count.get()) >= records)
    }

    fn push(self: &Rc<Self>, record: &impl Message, uplink: &Rc<dyn Uplink>) -> bool {
        if self.count.get() > 0 && self.is_over_limit() {
            self.flush(uplink);
            if self.count.get() > 0 {
                return false;
            }
        }
        let mut buffer = self.buffer.borrow_mut();
        encode_key(self.plan.shape.record, WireType::LengthDelimited, &mut *buffer);
        encode_varint(record.encoded_len() as u64, &mut *buffer);
        record.encode_raw(&mut *buffer);
        drop(buffer);
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
                    tokio::time::sleep(interval).await;
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
        let plan = &self.plan;
        match &plan.call {
            CallKind::Stream(first) => {
                let mut stream = self.stream.borrow_mut();
                let begins = !stream.as_ref().is_some_and(|stream| stream.is_open());
                if begins {
                    *stream = uplink.stream(&plan.service, plan.path);
                }
                if let Some(stream) = stream.as_ref().filter(|stream| !stream.is_full()) {
                    stream.send(self.take(if begins { first } else { b"" }));
                }
            }
            CallKind::Unary(_) => {
                let count = self.count.get();
                let answer = uplink.unary(&plan.service, plan.path, self.take(b""));
                let plan = plan.clone();
                tokio::task::spawn_local(async move {
                    let answer = answer.await;
                    if let CallKind::Unary(done) = &plan.call {
                        done(count, answer);
                    }
                });
            }
        }
    }

    /// The batch as a message in its gRPC frame. The buffer is empty then, and as large as it was.
    fn take(&self, first: &[u8]) -> Bytes {
        let mut records = self.buffer.borrow_mut();
        let frame = framed(first, &self.plan.shape, &records);
        records.clear();
        self.count.set(0);
        frame
    }
}

/// A message in its gRPC frame: `first`, then the records in the fields around them.
fn framed(first: &[u8], shape: &Shape, records: &[u8]) -> Bytes {
    // From the inside out: what each level holds.
    let mut sizes = Vec::with_capacity(shape.levels.len());
    let mut size = records.len();
    for (number, before) in shape.levels.iter().rev() {
        let inner = before.len() + size;
        sizes.push(inner);
        size = inner + prost::encoding::key_len(*number) + prost::encoding::encoded_len_varint(inner as u64);
    }
    let length = first.len() + size;
    let mut out = Vec::with_capacity(5 + length);
    out.push(0);
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(first);
    for ((number, before), inner) in shape.levels.iter().zip(sizes.iter().rev()) {
        encode_key(*number, WireType::LengthDelimited, &mut out);
        encode_varint(*inner as u64, &mut out);
        out.extend_from_slice(before);
    }
    out.extend_from_slice(records);
    out.into()
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
