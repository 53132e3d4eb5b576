//! The codec's stats: `http2.*` below the root for clients, `cluster.NAME.http2.*` for hosts. Connections count as
//! `nghttp2`'s, the codec that Envoy uses unless told otherwise.

use sampan_core::stats::{Counter, Gauge, Scope};

macro_rules! stats {
    (counters { $($counter:ident)* } gauges { $($gauge:ident)* }) => {
        /// The stats of Envoy's HTTP/2 codec.
        #[allow(missing_docs, reason = "the names are Envoy's and documented there")]
        pub struct CodecStats { $(pub $counter: Counter,)* $(pub $gauge: Gauge,)* }

        impl CodecStats {
            /// The stats below `http2.` in a scope.
            pub fn new(scope: &Scope) -> Self {
                let scope = scope.scope("http2");
                Self {
                    $($counter: scope.counter(stringify!($counter)),)*
                    $($gauge: scope.gauge(stringify!($gauge)),)*
                }
            }
        }
    };
}

stats! {
    counters {
        cookies_total_bytes_too_large dropped_headers_with_underscores goaway_sent header_list_size_too_large
        header_overflow headers_cb_no_stream inbound_empty_frames_flood inbound_priority_frames_flood
        inbound_window_update_frames_flood keepalive_timeout metadata_empty_frames
        nghttp2_downstream_connections nghttp2_upstream_connections oghttp2_downstream_connections
        oghttp2_upstream_connections outbound_control_flood outbound_flood requests_rejected_with_underscores_in_headers rx_messaging_error rx_reset
        stream_refused_errors trailers tx_flush_timeout tx_reset
    }
    gauges {
        deferred_stream_close outbound_control_frames_active outbound_frames_active pending_send_bytes
        streams_active
    }
}
