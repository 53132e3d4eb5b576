//! HTTP connection manager, filters, route table, router.
