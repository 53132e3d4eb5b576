//! What every stage of the proxy shares.
//!
//! Nothing here opens a socket of the data path or knows a filter. In the order of a request:
//! [`address`] and [`header`] are what it is made of, [`stream_info`] is what becomes known about it on its
//! way, [`matcher`], [`rbac`] and [`mod@format`] read it, [`state_values`] adds to it, [`stats`] and [`access_log`] tell of it afterwards.
//! [`cel`] evaluates expressions over it; [`error`] is how a wrong configuration is refused, [`runtime`] what an operator may change while it serves,
//! [`peer`] what Istio tells of the workload at the other end, [`clock`] what time it is, [`time`] how to wait, [`drain`] how it ends, [`overload`] what it does when there is too much of it.

pub mod access_log;
pub mod address;
pub mod cel;
pub mod clock;
pub mod config_source;
pub mod custom_tag;
pub mod drain;
pub mod error;
pub mod export;
pub mod format;
pub mod header;
pub mod http_service;
pub mod local_info;
pub mod log;
pub mod matcher;
pub mod otlp;
pub mod overload;
pub mod peer;
pub mod proxy_protocol;
pub mod rbac;
pub mod runtime;
pub mod state_values;
pub mod stats;
pub mod stream_info;
pub mod time;
pub mod xxhash;

pub use address::Address;
pub use error::{ConfigError, ConfigResult};
pub use header::{HeaderId, HeaderMap, HeaderName};
