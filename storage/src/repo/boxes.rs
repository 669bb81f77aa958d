//! Boxes of tensors: where they lie, whether they tile a tensor, and which runs of bytes two of them share.

use std::ops::Range;

use towline_core::{Error, Result};

/// A part of a tensor: so many elements from `offset` along each dimension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) offset: Vec<usize>,
    pub(super) shape: Vec<usize>,
}

impl Region {
    /// All of a tensor.
    pub(super) fn whole(shape: &[usize]) -> Self {
        Self { offset: vec![0; shape.len()], shape: shape.to_vec() }
    }

    /// Its elements; `None` if they cannot be counted.
    pub(super) fn volume(&self) -> Option<usize> {
        self.shape.iter().try_fold(1usize, |volume, &length| volume.checked_mul(length))
    }

    /// Whether it lies within a tensor of the shape `global`.
    pub(super) fn fits(&self, global: &[usize]) -> bool {
        self.offset.len() == global.len()
            && self.shape.len() == global.len()
            && self
                .ranges()
                .zip(global)
                .all(|(range, &length)| range.is_some_and(|range| range.end <= length))
    }

    /// Its range along each dimension.
    fn ranges(&self) -> impl Iterator<Item = Option<Range<usize>>> {
        let both = self.offset.iter().zip(&self.shape);
        both.map(|(&start, &length)| start.checked_add(length).map(|end| start..end))
    }

    /// What both have; `None` if that is nothing. Both fit the same tensor.
    pub(super) fn overlap(&self, other: &Self) -> Option<Self> {
        let mut both = Self { offset: Vec::new(), shape: Vec::new() };
        for (mine, theirs) in self.ranges().zip(other.ranges()) {
            let (mine, theirs) = (mine?, theirs?);
            let (start, end) = (mine.start.max(theirs.start), mine.end.min(theirs.end));
            both.offset.push(start);
            both.shape.push(end.checked_sub(start).filter(|&length| length > 0)?);
        }
        Some(both)
    }

    /// The runs of elements of `part`, which lies in `self` and in `other`, that follow one another in both: where in
    /// `self`, where in `other`, and how long each is.
    pub(super) fn runs<'a>(&'a self, other: &'a Self, part: &'a Self) -> Runs<'a> {
        // The dimensions from `inner` on are one run: all of them but the first whole in both.
        let mut inner = part.shape.len();
        let mut length = 1;
        while inner > 0 {
            inner -= 1;
            let (Some(&here), Some(&mine), Some(&theirs)) =
                (part.shape.get(inner), self.shape.get(inner), other.shape.get(inner))
            else {
                break;
            };
            length *= here;
            if here != mine || here != theirs {
                break;
            }
        }
        let outer: usize = part.shape.iter().take(inner).product();
        Runs { from: self, to: other, part, inner, length, next: 0, count: outer }
    }

    /// The place, in elements from its start, of the element that is at `at` in the tensor.
    fn place(&self, at: &[usize]) -> usize {
        let each = at.iter().zip(&self.offset).zip(&self.shape);
        each.fold(0, |place, ((&at, &offset), &length)| place * length + (at - offset))
    }
}

/// See [`Region::runs`].
#[derive(Debug, Clone)]
pub(super) struct Runs<'a> {
    from: &'a Region,
    to: &'a Region,
    part: &'a Region,
    inner: usize,
    length: usize,
    next: usize,
    count: usize,
}

impl Iterator for Runs<'_> {
    type Item = (usize, usize, usize);

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.count {
            return None;
        }
        let mut rest = self.next;
        self.next += 1;
        let mut at = self.part.offset.clone();
        let outer = at.iter_mut().zip(&self.part.shape).take(self.inner).rev();
        for (at, &length) in outer {
            *at += rest % length.max(1);
            rest /= length.max(1);
        }
        Some((self.from.place(&at), self.to.place(&at), self.length))
    }
}

/// Whether `regions` cover a tensor of the shape `global` exactly once.
///
/// # Errors
/// `Invalid`, saying where a hole or an overlap is.
pub(super) fn check_tiling(name: &str, global: &[usize], regions: &mut [Region]) -> Result<()> {
    let wrong = |what: String| {
        Err(Error::invalid(format!("tensor `{name}` of shape {global:?}: {what}"))
            .with_help("let each element be saved by one rank, and by one alone"))
    };
    let mut covered = Some(0usize);
    for region in regions.iter() {
        if !region.fits(global) {
            return wrong(format!("the box {:?} from {:?} lies outside", region.shape, region.offset));
        }
        covered = covered.zip(region.volume()).and_then(|(sum, volume)| sum.checked_add(volume));
    }
    regions.sort_by(|left, right| left.offset.cmp(&right.offset));
    for (at, left) in regions.iter().enumerate() {
        let end = left.ranges().next().flatten().map(|range| range.end);
        let near = regions
            .iter()
            .skip(at + 1)
            .take_while(|right| end.is_none_or(|end| right.offset.first().is_some_and(|&start| start < end)));
        for right in near {
            if left.volume() != Some(0) && left.overlap(right).is_some() {
                return wrong(format!(
                    "the boxes {:?} from {:?} and {:?} from {:?} overlap",
                    left.shape, left.offset, right.shape, right.offset
                ));
            }
        }
    }
    let wanted = Region::whole(global).volume();
    if covered == wanted && !regions.is_empty() {
        return Ok(());
    }
    let count = |elements: Option<usize>| elements.map_or("too many".to_owned(), |count| count.to_string());
    wrong(format!("{} of {} elements are saved: there is a hole", count(covered), count(wanted)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn region(offset: &[usize], shape: &[usize]) -> Region {
        Region { offset: offset.to_vec(), shape: shape.to_vec() }
    }

    #[test]
    fn holes_and_overlaps_are_found() {
        let halves = [region(&[0, 0], &[2, 4]), region(&[2, 0], &[2, 4])];
        assert!(check_tiling("t", &[4, 4], &mut halves.clone()).is_ok());
        let columns = [region(&[0, 2], &[4, 2]), region(&[0, 0], &[4, 2])];
        assert!(check_tiling("t", &[4, 4], &mut columns.clone()).is_ok());
        for (says, mut regions) in [
            ("hole", vec![halves[0].clone()]),
            ("hole", vec![]),
            ("overlap", vec![halves[0].clone(), halves[0].clone()]),
            ("overlap", vec![halves[0].clone(), columns[0].clone()]),
            ("outside", vec![region(&[1, 0], &[4, 4])]),
            ("outside", vec![region(&[0], &[4])]),
            ("outside", vec![region(&[usize::MAX, 0], &[4, 4])]),
        ] {
            let error = check_tiling("t", &[4, 4], &mut regions).unwrap_err();
            assert!(error.message().contains(says), "{error}");
        }
        assert!(check_tiling("scalar", &[], &mut [region(&[], &[])]).is_ok());
        assert!(check_tiling("scalar", &[], &mut [region(&[], &[]), region(&[], &[])]).is_err());
        assert!(check_tiling("empty", &[0, 4], &mut [region(&[0, 0], &[0, 4])]).is_ok());
    }

    /// A shape, and two boxes in it.
    fn boxes() -> impl Strategy<Value = (Vec<usize>, Region, Region)> {
        proptest::collection::vec(1usize..6, 0..4).prop_flat_map(|shape| {
            let side =
                |length: usize| (0..length).prop_flat_map(move |start| (Just(start), 1..=length - start));
            let one = move |shape: &[usize]| {
                shape.iter().map(|&length| side(length)).collect::<Vec<_>>().prop_map(|sides| {
                    let (offset, shape) = sides.into_iter().unzip();
                    Region { offset, shape }
                })
            };
            (Just(shape.clone()), one(&shape), one(&shape))
        })
    }

    /// The place of each element of `region` in a tensor, in order.
    fn elements(region: &Region, global: &[usize]) -> Vec<usize> {
        let whole = Region::whole(global);
        let mut places: Vec<_> =
            region.runs(&whole, region).flat_map(|(_, to, length)| to..to + length).collect();
        places.sort_unstable();
        places
    }

    proptest! {
        #[test]
        fn runs_copy_what_both_have((global, from, to) in boxes()) {
            let source = elements(&from, &global);
            prop_assert_eq!(source.len(), from.volume().unwrap());
            let wanted = elements(&to, &global);
            let mut target = vec![None; wanted.len()];
            if let Some(part) = from.overlap(&to) {
                for (here, there, length) in from.runs(&to, &part) {
                    for step in 0..length {
                        prop_assert!(target[there + step].is_none());
                        target[there + step] = Some(source[here + step]);
                    }
                }
            }
            for (found, wanted) in target.iter().zip(&wanted) {
                let expected = source.contains(wanted).then_some(*wanted);
                prop_assert_eq!(*found, expected);
            }
        }
    }
}
