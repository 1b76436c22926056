//! P19: no workload makes the engine allocate or free memory, whatever becomes of its frames.

use engine_bench::runs;
use engine_bench::workload::Plan;

#[test]
fn no_workload_allocates_or_frees() {
    let mut seen = Vec::new();
    for name in Plan::names() {
        // Few flows: with many, only the time differs.
        let plan = Plan::new(name, 256, 8, 50).unwrap();
        let info = runs::allocations(&plan).unwrap();
        if info.count_total != 0 || info.count_current != 0 {
            seen.push(format!("{name}: {info:?}"));
        }
    }
    assert!(seen.is_empty(), "{}", seen.join("\n"));
}

#[test]
fn allocations_would_be_seen() {
    let info = allocation_counter::measure(|| drop(std::hint::black_box(vec![0_u8; 100])));
    assert_eq!((info.count_total, info.count_current), (1, 0));
}
