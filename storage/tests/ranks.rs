//! Train states of many ranks: written at once, read by another number of ranks, refused where they do not fit.

mod common;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use common::{find, name, noise, session, shared};
use futures_util::future::try_join_all;
use proptest::prelude::*;
use towline_core::{DType, ErrorKind, SnapshotKind, SnapshotStore, TensorMeta, Weights};
use towline_storage::testing::{Fault, FaultStore, Operation, Plan};
use towline_storage::{
    BoxRead, Local, Memory, Prune, Publish, RankPart, RankReceipt, Retention, SaveTrainState, SnapshotInfo,
    SnapshotRepo, StateReader, Wanted, Writer,
};

const SOON: Duration = Duration::from_secs(5);

fn ranks(count: u32) -> NonZeroU32 {
    NonZeroU32::new(count).unwrap()
}

/// A tensor of a model, cut along one dimension for a number of ranks.
#[derive(Debug, Clone)]
struct Sharded {
    meta: TensorMeta,
    data: Bytes,
    /// The dimension; `None` if rank 0 has it whole.
    along: Option<usize>,
}

impl Sharded {
    fn new(text: &str, dtype: DType, shape: &[usize], along: Option<usize>) -> Self {
        let meta = TensorMeta::new(text, dtype, shape).unwrap();
        Self { data: noise(text, meta.byte_len()), meta, along }
    }

    /// Offset and shape of the part of `rank` of `count`; `None` if it has none.
    fn part(&self, rank: usize, count: usize) -> Option<(Vec<usize>, Vec<usize>)> {
        let shape = self.meta.shape();
        let (mut offset, mut part) = (vec![0; shape.len()], shape.to_vec());
        match self.along {
            None => return (rank == 0).then_some((offset, part)),
            Some(along) => {
                let each = shape[along].div_ceil(count);
                offset[along] = (rank * each).min(shape[along]);
                part[along] = each.min(shape[along] - offset[along]);
            }
        }
        (!part.contains(&0)).then_some((offset, part))
    }

    /// The bytes of a box, element by element: the plain way.
    fn cut(&self, offset: &[usize], shape: &[usize]) -> Bytes {
        let width = self.meta.dtype().bits() as usize / 8;
        let mut out = Vec::new();
        let count: usize = shape.iter().product();
        for number in 0..count {
            let (mut rest, mut place, mut step) = (number, 0, 1);
            for (at, &whole) in self.meta.shape().iter().enumerate().rev() {
                place += (offset[at] + rest % shape[at]) * step;
                rest /= shape[at];
                step *= whole;
            }
            out.extend_from_slice(&self.data[place * width..(place + 1) * width]);
        }
        out.into()
    }
}

/// Blocks of 1 MiB are crossed in several ways: rows and columns, small and large, whole and not at all.
fn model() -> Vec<Sharded> {
    vec![
        Sharded::new("columns", DType::BF16, &[1024, 1536], Some(1)),
        Sharded::new("deep", DType::BF16, &[8, 24, 8], Some(1)),
        Sharded::new("empty", DType::F32, &[0, 4], None),
        Sharded::new("norm", DType::F32, &[96], Some(0)),
        Sharded::new("rows", DType::F32, &[1536, 768], Some(0)),
        Sharded::new("scalar", DType::F64, &[], None),
        Sharded::new("whole", DType::F32, &[33, 5], None),
    ]
}

fn part_of(model: &[Sharded], rank: usize, count: usize) -> RankPart {
    let mut tensors = Vec::new();
    let mut boxes = Vec::new();
    for tensor in model {
        let Some((offset, shape)) = tensor.part(rank, count) else { continue };
        let meta = TensorMeta::new(tensor.meta.name(), tensor.meta.dtype(), shape.clone()).unwrap();
        tensors.push((meta, tensor.cut(&offset, &shape)));
        boxes.push((tensor.meta.clone(), offset));
    }
    boxes.into_iter().fold(RankPart::new(Arc::new(Weights::new(tensors).unwrap())), |part, (meta, offset)| {
        part.with_box(meta.name(), meta.name(), meta.shape(), offset)
    })
}

async fn save(writer: &Writer, text: &str, model: &[Sharded], count: u32) -> SnapshotInfo {
    let save =
        writer.begin_state(SaveTrainState::ranked(name(text)).with_step(7), ranks(count)).await.unwrap();
    let parts: Vec<_> = (0..count).map(|rank| part_of(model, rank as usize, count as usize)).collect();
    let writes =
        (0..count).zip(&parts).map(|(rank, part)| writer.repo().write_rank(save.ticket(), rank, part));
    let receipts = try_join_all(writes).await.unwrap();
    save.commit(&receipts, SOON).await.unwrap()
}

/// Every rank of `count` reads its parts, as it would have written them.
async fn read_as(reader: &StateReader, model: &[Sharded], count: usize) {
    for rank in 0..count {
        for tensor in model {
            let Some((offset, shape)) = tensor.part(rank, count) else { continue };
            let found = reader.read(tensor.meta.name(), &offset, &shape).await.unwrap();
            assert!(found == tensor.cut(&offset, &shape), "{} of rank {rank} of {count}", tensor.meta.name());
        }
    }
}

fn repo(store: Arc<dyn SnapshotStore>) -> SnapshotRepo {
    common::repo(store).with_shard_bytes(1 << 20)
}

#[tokio::test]
async fn another_number_of_ranks_reads_it_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let stores: [Arc<dyn SnapshotStore>; 2] =
        [Arc::new(Memory::new()), Arc::new(Local::open(dir.path()).unwrap())];
    let model = model();
    for store in stores {
        let repo = repo(store);
        let writer = repo.writer(session(1)).await.unwrap();
        for count in [1, 4] {
            let info = save(&writer, &format!("s-{count}"), &model, count).await;
            assert_eq!((info.step, info.kind), (Some(7), SnapshotKind::State));
            let reader = repo.open_state(&info).await.unwrap();
            assert!(reader.tensors().eq(model.iter().map(|tensor| &tensor.meta)));
            for readers in [1, 2, 3, 8] {
                read_as(&reader, &model, readers).await;
            }
            let state = repo.load_state(&info).await.unwrap();
            for (tensor, (meta, data)) in model.iter().zip(state.tensors.iter()) {
                assert_eq!((&tensor.meta, &tensor.data), (meta, data));
            }
            assert_eq!(repo.verify(&info).await.unwrap().tensors, model.len() as u64);
        }
        // One process alone: the same form.
        let plain = writer.save_state(SaveTrainState::new(name("plain"), shared("plain"))).await.unwrap();
        let reader = repo.open_state(&plain).await.unwrap();
        let weights = shared("plain");
        let (_, whole) = weights.get("layer.0.mlp").unwrap();
        assert_eq!(reader.read("layer.0.mlp", &[10, 0], &[7, 32]).await.unwrap(), whole[10 * 128..17 * 128]);
        let half = reader.read("packed", &[0, 0], &[16, 4]).await.unwrap();
        assert_eq!(half, weights.get("packed").unwrap().1[..32]);
        let odd = reader.read("packed", &[0, 0], &[32, 3]).await.unwrap_err();
        assert_eq!(odd.kind(), ErrorKind::Unsupported);
    }
}

#[tokio::test]
async fn boxes_are_read_into_the_callers_memory() {
    let repo = repo(Arc::new(Memory::new()));
    let writer = repo.writer(session(1)).await.unwrap();
    let model = model();
    let info = save(&writer, "s", &model, 4).await;
    let reader = repo.open_state(&info).await.unwrap();
    let rows = &model[4];
    let buffer = BytesMut::zeroed(rows.data.len());
    let place = buffer.as_ptr();
    let buffer = reader.read_into("rows", &[0, 0], &[1536, 768], buffer).await.unwrap();
    assert_eq!(buffer, rows.data);
    assert_eq!(buffer.as_ptr(), place, "it was put together again where it was");
    // Many at once, the largest first: they come back in their order.
    let whole = |tensor: &Sharded| BoxRead::whole(&tensor.meta, BytesMut::zeroed(tensor.data.len()));
    let mut boxes = vec![BoxRead::new("rows", [512, 0], [4, 768], BytesMut::zeroed(4 * 768 * 4))];
    boxes.extend(model.iter().rev().map(whole));
    let read = reader.read_boxes(boxes).await.unwrap();
    assert_eq!(read[0], rows.data[512 * 768 * 4..516 * 768 * 4]);
    assert!(read[1..].iter().eq(model.iter().rev().map(|tensor| &tensor.data)));
    let short = BoxRead::new("rows", [0, 0], [1536, 768], BytesMut::new());
    assert_eq!(reader.read_boxes(vec![short]).await.unwrap_err().kind(), ErrorKind::Invalid);
    for (text, offset, shape, length, kind) in [
        ("rows", &[0, 0][..], &[1536, 768][..], 5, ErrorKind::Invalid),
        ("rows", &[1, 0], &[1536, 768], 1536 * 768 * 4, ErrorKind::Invalid),
        ("rows", &[0], &[1536], 1536 * 4, ErrorKind::Invalid),
        ("rows", &[usize::MAX, 0], &[2, 2], 16, ErrorKind::Invalid),
        ("other", &[], &[], 0, ErrorKind::NotFound),
    ] {
        let error = reader.read_into(text, offset, shape, BytesMut::zeroed(length)).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
    let base = writer.publish(Publish::new(name("b"), SnapshotKind::Base, shared("b"))).await;
    base.unwrap();
    let sampler = repo.find("b", Wanted::Sampler).await.unwrap();
    assert_eq!(repo.open_state(&sampler).await.unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn what_does_not_tile_is_refused() {
    let repo = repo(Arc::new(Memory::new()));
    let writer = repo.writer(session(1)).await.unwrap();
    let half = |offset: usize, rows: usize, dtype: DType| {
        let meta = TensorMeta::new("t", dtype, [rows, 2]).unwrap();
        let data = noise("t", meta.byte_len());
        RankPart::new(Arc::new(Weights::new([(meta, data)]).unwrap())).with_box("t", "t", [8, 2], [offset, 0])
    };
    for (number, (second, says)) in [
        (half(5, 3, DType::F32), "hole"),
        (half(3, 5, DType::F32), "overlap"),
        (half(4, 4, DType::BF16), "one rank"),
    ]
    .into_iter()
    .enumerate()
    {
        let state = SaveTrainState::ranked(name(&format!("s-{number}")));
        let save = writer.begin_state(state, ranks(2)).await.unwrap();
        for (rank, part) in [(0, half(0, 4, DType::F32)), (1, second)] {
            repo.write_rank(save.ticket(), rank, &part).await.unwrap();
        }
        let error = save.commit(&[], SOON).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.message().contains(says) && error.message().contains("`t`"), "{error}");
    }
    assert!(repo.list().await.unwrap().is_empty());
    let save = writer.begin_state(SaveTrainState::ranked(name("s")), ranks(2)).await.unwrap();
    for (rank, part) in [(2, half(0, 4, DType::F32)), (0, half(6, 4, DType::F32))] {
        assert_eq!(repo.write_rank(save.ticket(), rank, &part).await.unwrap_err().kind(), ErrorKind::Invalid);
    }
    let other = half(0, 4, DType::F32).with_box("u", "u", [1], [0]);
    assert_eq!(repo.write_rank(save.ticket(), 0, &other).await.unwrap_err().kind(), ErrorKind::Invalid);
    let filled = SaveTrainState::new(name("x"), shared("x"));
    assert_eq!(writer.begin_state(filled, ranks(2)).await.unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn a_rank_that_is_missing_is_named_in_time() {
    let repo = repo(Arc::new(Memory::new()));
    let writer = repo.writer(session(1)).await.unwrap();
    let model = model();
    let save = writer.begin_state(SaveTrainState::ranked(name("s")), ranks(3)).await.unwrap();
    let mut receipts = Vec::new();
    for rank in [0, 2] {
        receipts
            .push(repo.write_rank(save.ticket(), rank, &part_of(&model, rank as usize, 3)).await.unwrap());
    }
    let error = save.commit(&[], Duration::from_millis(300)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.message().contains("rank 1 of 3"), "{error}");
    // It is not visible, and its name is free.
    assert!(repo.list().await.unwrap().is_empty());
    let save = writer.begin_state(SaveTrainState::ranked(name("s")), ranks(3)).await.unwrap();
    assert_eq!(save.commit(&receipts, SOON).await.unwrap_err().kind(), ErrorKind::NotFound);
    // One that comes late is waited for.
    let save = writer.begin_state(SaveTrainState::ranked(name("s")), ranks(2)).await.unwrap();
    let ticket = save.ticket().clone();
    let late = async {
        repo.write_rank(&ticket, 0, &part_of(&model, 0, 2)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(400)).await;
        repo.write_rank(&ticket, 1, &part_of(&model, 1, 2)).await.unwrap();
    };
    let (info, ()) = tokio::join!(save.commit(&[], SOON), late);
    read_as(&repo.open_state(&info.unwrap()).await.unwrap(), &model, 2).await;
}

#[tokio::test]
async fn a_rank_may_write_again() {
    let repo = repo(Arc::new(Memory::new()));
    let writer = repo.writer(session(1)).await.unwrap();
    let model = model();
    let save = writer.begin_state(SaveTrainState::ranked(name("s")), ranks(1)).await.unwrap();
    let first = repo.write_rank(save.ticket(), 0, &part_of(&model, 0, 1)).await.unwrap();
    let again = repo.write_rank(save.ticket(), 0, &part_of(&model, 0, 1)).await.unwrap();
    assert_eq!(first, again);
    let other = RankPart::new(shared("other"));
    let error = repo.write_rank(save.ticket(), 0, &other).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    // Ticket and receipt go from process to process.
    let ticket = serde_json::to_string(save.ticket()).unwrap();
    assert_eq!(*save.ticket(), serde_json::from_str(&ticket).unwrap());
    let text = serde_json::to_string(&first).unwrap();
    let receipt: RankReceipt = serde_json::from_str(&text).unwrap();
    let info = save.commit(&[receipt], SOON).await.unwrap();
    repo.verify(&info).await.unwrap();
}

#[tokio::test]
async fn a_rank_that_misreads_its_own_index_keeps_its_files() {
    let misread = Arc::new(FaultStore::new(Arc::new(Memory::new()), Plan::default()));
    let lost = Arc::new(FaultStore::new(Arc::clone(&misread) as _, Plan::default()));
    let repo = repo(Arc::clone(&lost) as _);
    let writer = repo.writer(session(1)).await.unwrap();
    let model = model();
    let save = writer.begin_state(SaveTrainState::ranked(name("s")), ranks(1)).await.unwrap();
    // Its index is there, it is told that another one is, and sees another one when it looks.
    lost.script(Operation::Put, "rank-0.json", [Fault::Lose(ErrorKind::AlreadyExists)]);
    misread.script(Operation::Get, "rank-0.json", [Fault::FlipBit]);
    let receipt = repo.write_rank(save.ticket(), 0, &part_of(&model, 0, 1)).await.unwrap();
    assert_eq!((lost.left(), misread.left()), (0, 0));
    let info = save.commit(&[receipt], SOON).await.unwrap();
    repo.verify(&info).await.unwrap();
}

#[tokio::test]
async fn saves_go_on_while_ranks_write() {
    let repo = repo(Arc::new(Memory::new()));
    let writer = repo.writer(session(1)).await.unwrap();
    let model = model();
    let save = writer.begin_state(SaveTrainState::ranked(name("s")), ranks(2)).await.unwrap();
    repo.write_rank(save.ticket(), 0, &part_of(&model, 0, 2)).await.unwrap();
    writer.publish(Publish::new(name("b"), SnapshotKind::Base, shared("b"))).await.unwrap();
    // What ranks write belongs to nobody else, as long as the state may still be committed.
    let careless = Prune::new(Retention::new()).with_grace(Duration::from_secs(3600));
    assert!(repo.prune(&careless).await.unwrap().orphans.is_empty());
    repo.write_rank(save.ticket(), 1, &part_of(&model, 1, 2)).await.unwrap();
    let state = save.commit(&[], SOON).await.unwrap();
    let seqs: Vec<_> =
        repo.list().await.unwrap().iter().map(|info| (info.seq, info.name.to_string())).collect();
    assert_eq!(seqs, [(1, "s".to_owned()), (2, "b".to_owned())]);
    read_as(&repo.open_state(&state).await.unwrap(), &model, 3).await;
    // One that was begun before the grace is over: nothing of it becomes visible.
    let save = writer.begin_state(SaveTrainState::ranked(name("t")), ranks(1)).await.unwrap();
    repo.write_rank(save.ticket(), 0, &part_of(&model, 0, 1)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(5)).await;
    repo.prune(&Prune::new(Retention::new()).with_grace(Duration::ZERO)).await.unwrap();
    let error = save.commit(&[], SOON).await.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Conflict | ErrorKind::TimedOut), "{error}");
    assert!(repo.find("t", Wanted::Any).await.is_err());
}

#[tokio::test]
async fn a_fenced_coordinator_commits_nothing() {
    let repo = repo(Arc::new(Memory::new()));
    let first = repo.writer(session(1)).await.unwrap();
    let save = first.begin_state(SaveTrainState::ranked(name("s")), ranks(1)).await.unwrap();
    let receipt = repo.write_rank(save.ticket(), 0, &part_of(&model(), 0, 1)).await.unwrap();
    let second = repo.writer(session(2)).await.unwrap();
    assert_eq!(save.commit(&[receipt], SOON).await.unwrap_err().kind(), ErrorKind::Fenced);
    assert!(repo.list().await.unwrap().is_empty());
    second.save_state(SaveTrainState::new(name("s"), shared("s"))).await.unwrap();
    assert_eq!(find(&repo, "s").await.seq, 2);
}

#[tokio::test]
async fn a_flipped_bit_is_found_by_whoever_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let repo = repo(Arc::new(Local::open(dir.path()).unwrap()));
    let writer = repo.writer(session(1)).await.unwrap();
    let model = model();
    let info = save(&writer, "s", &model, 2).await;
    let folder = dir.path().join("job").join(info.dir.as_str());
    for file in std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()) {
        let good = std::fs::read(&file).unwrap();
        let mut bad = good.clone();
        let last = bad.len() - 1;
        bad[last] ^= 1;
        std::fs::write(&file, &bad).unwrap();
        let found = match repo.open_state(&info).await {
            Ok(reader) => {
                let mut found = Vec::new();
                for tensor in &model {
                    let shape = tensor.meta.shape();
                    let read = reader.read(tensor.meta.name(), &vec![0; shape.len()], shape).await;
                    found.extend(read.err());
                }
                found
            }
            Err(error) => vec![error],
        };
        assert_eq!(found.len(), 1, "{}", file.display());
        assert_eq!(found[0].kind(), ErrorKind::Corrupt, "{}", found[0]);
        std::fs::write(&file, good).unwrap();
    }
    repo.verify(&info).await.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Any cut into a grid of boxes, read as any box.
    #[test]
    fn any_grid_is_read_as_any_box(
        shape in proptest::collection::vec(1usize..40, 1..4),
        cuts in proptest::collection::vec(1usize..4, 3),
        wanted in proptest::collection::vec((0.0..1.0f64, 0.0..1.0f64), 3),
    ) {
        // The last dimension is long, so that blocks are crossed.
        let mut shape = shape;
        *shape.last_mut().unwrap() *= 997;
        let tensor = Sharded::new("t", DType::U8, &shape, None);
        let grid: Vec<Vec<usize>> = shape.iter().zip(&cuts).map(|(&length, &count)| {
            (0..=count).map(|at| length * at / count).collect()
        }).collect();
        let mut boxes = vec![(Vec::new(), Vec::new())];
        for edges in &grid {
            boxes = boxes.into_iter().flat_map(|(offset, sides): (Vec<usize>, Vec<usize>)| {
                edges.windows(2).filter(|pair| pair[0] < pair[1]).map(move |pair| {
                    let (mut offset, mut sides) = (offset.clone(), sides.clone());
                    offset.push(pair[0]);
                    sides.push(pair[1] - pair[0]);
                    (offset, sides)
                })
            }).collect();
        }
        let (mut offset, mut sides) = (Vec::new(), Vec::new());
        for (&length, (start, size)) in shape.iter().zip(&wanted) {
            let first = ((length as f64) * start) as usize;
            offset.push(first);
            sides.push(1 + (((length - first - 1) as f64) * size) as usize);
        }
        towline_core::testing::block_on(async {
            let repo = repo(Arc::new(Memory::new()));
            let writer = repo.writer(session(1)).await.unwrap();
            let save = writer.begin_state(SaveTrainState::ranked(name("s")), ranks(2)).await.unwrap();
            for rank in 0..2 {
                let mine = boxes.iter().skip(rank).step_by(2).enumerate();
                let mut tensors = Vec::new();
                let mut places = Vec::new();
                for (number, (offset, sides)) in mine {
                    let key = format!("t.{number}");
                    let meta = TensorMeta::new(key.as_str(), DType::U8, sides.clone()).unwrap();
                    tensors.push((meta, tensor.cut(offset, sides)));
                    places.push((key, offset.clone()));
                }
                let part = RankPart::new(Arc::new(Weights::new(tensors).unwrap()));
                let part = places.into_iter().fold(part, |part, (key, offset)| {
                    part.with_box(key, "t", shape.clone(), offset)
                });
                repo.write_rank(save.ticket(), rank as u32, &part).await.unwrap();
            }
            let info = save.commit(&[], SOON).await.unwrap();
            let reader = repo.open_state(&info).await.unwrap();
            let found = reader.read("t", &offset, &sides).await.unwrap();
            assert_eq!(found, tensor.cut(&offset, &sides));
        });
    }
}
