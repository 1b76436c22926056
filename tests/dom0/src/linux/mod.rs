//! Channels over Xen's devices: for a dom0 that runs Linux.
//!
//! | module | what |
//! | --- | --- |
//! | [`device`] | the three devices and the memory behind them; the only unsafe code |
//! | [`ring`] | the byte rings, written a second time, with atomic instructions as in the reference |
//! | [`xenstore`] | a few blocking requests on xenstored's socket |
//! | [`channels`] | both roles behind [`qubes::vchan::Channels`] |
//! | [`cycles`] | clients that come and go quickly |
//! | [`loopback`] | dom0 talks to itself, to see that the devices are used rightly |
//!
//! Needs `/dev/xen/evtchn`, `/dev/xen/gntdev`, `/dev/xen/gntalloc` and xenstored's socket, as root.
//!
//! Source: Linux `include/uapi/xen/{evtchn,gntdev,gntalloc}.h`, Xen `public/io/{libxenvchan,xs_wire}.h`.

pub mod channels;
pub mod cycles;
pub mod device;
pub mod loopback;
pub mod ring;
pub mod xenstore;
