use super::*;

/// A collector that takes everything, until it is told not to.
#[derive(Default)]
struct Collector {
    sent: RefCell<Vec<Bytes>>,
    full: Cell<bool>,
    open: Rc<Cell<bool>>,
    streams: Cell<u32>,
}

struct Flow(Rc<Collector>);

impl Outflow for Flow {
    fn is_open(&self) -> bool {
        self.0.open.get()
    }
    fn is_full(&self) -> bool {
        self.0.full.get()
    }
    fn send(&self, frame: Bytes) {
        self.0.sent.borrow_mut().push(frame);
    }
}

struct Up(Rc<Collector>);

impl Uplink for Up {
    fn stream(&self, _: &Arc<GrpcService>, _: &'static str) -> Option<Box<dyn Outflow>> {
        self.0.open.set(true);
        self.0.streams.set(self.0.streams.get() + 1);
        Some(Box::new(Flow(self.0.clone())))
    }
    fn unary(&self, _: &Arc<GrpcService>, _: &'static str, message: Bytes) -> Answer {
        self.0.sent.borrow_mut().push(message);
        Box::pin(async { Err(14) })
    }
    fn post(&self, _: &Arc<HttpService>, body: Bytes, _: Duration) -> PostAnswer {
        self.0.sent.borrow_mut().push(body);
        Box::pin(async { Posted::Status(202) })
    }
}

fn service() -> Arc<GrpcService> {
    Arc::new(GrpcService {
        cluster: "c".into(),
        authority: "c".into(),
        metadata: Vec::new(),
        backoff: (Duration::ZERO, Duration::ZERO),
        max_message: 0,
        skip_envoy_headers: false,
    })
}

fn stream(first: &'static [u8]) -> Way {
    Way::Stream { service: service(), path: "/p", first: Bytes::from_static(first) }
}

fn exporter(way: Way, limit: usize) -> Exporter {
    let levels = vec![(2, Bytes::from_static(b"\x08\x01")), (3, Bytes::new())];
    Exporter::new(Plan {
        way,
        shape: Shape::Message { levels, record: 1 },
        interval: Setting::Fixed(20),
        limit,
        records: None,
        most: None,
        sent: None,
        timed: None,
    })
}

async fn with_collector<F: Future<Output = ()>>(test: impl FnOnce(Rc<Collector>) -> F) {
    let collector = Rc::new(Collector::default());
    install(Rc::new(Up(collector.clone())));
    tokio::task::LocalSet::new().run_until(test(collector)).await;
}

fn record(text: &str) -> String {
    text.to_owned()
}

#[tokio::test]
async fn a_batch_goes_out_when_it_is_large_or_old() {
    with_collector(|collector| async move {
        let exporter = exporter(stream(b"\x0a\x00"), 12);
        assert!(exporter.push(&record("a")));
        assert!(collector.sent.borrow().is_empty());
        assert!(exporter.push(&record("bcd")));
        let sent = |at: usize| collector.sent.borrow()[at].to_vec();
        // identifier, level 2 of 17 bytes: its own field, level 3, the two records (a StringValue each).
        let records = b"\x0a\x03\x0a\x01a\x0a\x05\x0a\x03bcd";
        assert_eq!(sent(0), [b"\0\0\0\0\x14\x0a\x00\x12\x10\x08\x01\x1a\x0c".as_slice(), records].concat());
        assert!(exporter.push(&record("e")));
        crate::time::sleep(Duration::from_millis(60)).await;
        assert_eq!(sent(1), b"\0\0\0\0\x0b\x12\x09\x08\x01\x1a\x05\x0a\x03\x0a\x01e");
        assert_eq!(collector.streams.get(), 1);
        collector.open.set(false);
        assert!(exporter.push(&record("0123456789")));
        assert_eq!((collector.streams.get(), sent(2)[5..7].to_vec()), (2, b"\x0a\x00".to_vec()));
    })
    .await;
}

#[tokio::test]
async fn what_a_full_stream_does_not_take_is_dropped() {
    with_collector(|collector| async move {
        let exporter = exporter(stream(b""), 1);
        collector.full.set(true);
        assert!(exporter.push(&record("a")), "one batch waits");
        assert!(!exporter.push(&record("b")));
        collector.full.set(false);
        assert!(exporter.push(&record("c")));
        assert_eq!(collector.sent.borrow().len(), 2);
    })
    .await;
}

#[tokio::test]
async fn a_call_tells_how_many_records_it_took() {
    use std::sync::Mutex;
    with_collector(|collector| async move {
        let told = Arc::new(Mutex::new(Vec::new()));
        let seen = told.clone();
        let done = move |count, answer: Result<Bytes, u16>| seen.lock().unwrap().push((count, answer.err()));
        let exporter = exporter(Way::Call { service: service(), path: "/p", done: Box::new(done) }, 1000);
        exporter.push(&record("a"));
        exporter.push(&record("b"));
        crate::time::sleep(Duration::from_millis(60)).await;
        assert_eq!(collector.sent.borrow().len(), 1);
        assert_eq!(*told.lock().unwrap(), [(2, Some(14))]);
    })
    .await;
}

#[test]
fn without_a_way_out_records_are_dropped() {
    std::thread::spawn(|| assert!(!exporter(stream(b""), 1).push(&record("a")))).join().unwrap();
}

#[tokio::test]
async fn a_post_is_a_bare_body() {
    with_collector(|collector| async move {
        let post = || Way::Post {
            service: Arc::new(HttpService::new("c", "c", "/p")),
            timeout: Setting::Fixed(1),
            done: Box::new(|_, _| {}),
        };
        exporter(post(), 1).push(&record("a"));
        let list = Exporter::new(Plan {
            way: post(),
            shape: Shape::Json,
            interval: Setting::Fixed(20),
            limit: usize::MAX,
            records: Some(Setting::Fixed(2)),
            most: None,
            sent: None,
            timed: None,
        });
        list.push_json(b"1");
        list.push_json(b"2");
        let sent: Vec<Vec<u8>> = collector.sent.borrow().iter().map(|body| body.to_vec()).collect();
        assert_eq!(sent, [b"\x12\x09\x08\x01\x1a\x05\x0a\x03\x0a\x01a".to_vec(), b"[1,2]".to_vec()]);
    })
    .await;
}
