//! Every target runs on its seeds and some thousand changes of them, and its seeds reach what they are meant for.

use towline_core::testing::CountingAllocator;
use towline_fuzz::TARGETS;
use towline_fuzz::mutate::{Random, mutate};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

#[test]
fn every_target_runs() {
    for target in TARGETS {
        let seeds = (target.seeds)();
        let accepted = seeds.iter().filter(|seed| (target.run)(seed)).count();
        assert!(accepted * 3 >= seeds.len(), "{}: {accepted} of {} seeds", target.name, seeds.len());
        let mut random = Random::new(7);
        for round in 0..2000 {
            let mut input = seeds[round % seeds.len()].clone();
            let other = &seeds[random.below(seeds.len())];
            mutate(&mut random, &mut input, other, 16 << 10);
            (target.run)(&input);
        }
    }
}
