//! Log lines without their source: [`info!`](crate::info), [`warn!`](crate::warn) and [`error!`](crate::error).
//!
//! They go to whatever logger the `log` crate has, like that crate's own macros. Those also hand over target, module, file
//! and line, 64 bytes of constants for every call and the code to pass them; our logger shows none of that, and our lines
//! say themselves what they are about.

use core::fmt::Arguments;

use log::Record;

pub use log::Level;

/// Hands a line to the logger. For the macros.
#[cold]
#[inline(never)]
pub fn line(level: Level, text: Arguments<'_>) {
    if level <= log::max_level() {
        log::logger().log(&Record::builder().level(level).args(text).build());
    }
}

/// Logs a line about the normal course of things.
#[macro_export]
macro_rules! info {
    ($($text:tt)+) => {
        $crate::log_line::line($crate::log_line::Level::Info, ::core::format_args!($($text)+))
    };
}

/// Logs a line about something odd that was dealt with.
#[macro_export]
macro_rules! warn {
    ($($text:tt)+) => {
        $crate::log_line::line($crate::log_line::Level::Warn, ::core::format_args!($($text)+))
    };
}

/// Logs a line about something that does not work.
#[macro_export]
macro_rules! error {
    ($($text:tt)+) => {
        $crate::log_line::line($crate::log_line::Level::Error, ::core::format_args!($($text)+))
    };
}
