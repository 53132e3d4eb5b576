//! Accept, listener filters, filter chain match, network filters.
