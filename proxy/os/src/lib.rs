//! Calls of the operating system that no safe crate offers: the one place of the workspace where `unsafe` stands.

pub mod alarm;
pub mod pages;
pub mod socket;
