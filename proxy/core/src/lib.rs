//! What every stage shares: header list, stats, runtime, matchers, formatter, access log.
