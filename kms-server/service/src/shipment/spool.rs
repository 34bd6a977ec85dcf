//! Reads a file in the spool in windows and divides it into lines. The memory that this takes does
//! not depend on the length of the file.

use std::sync::Arc;

use aws_lc_rs::digest::{self, SHA256};
use kms_domain::LONGEST_SHIPMENT_LINE;
use kms_store::{Store, UploadId};

use kms_base::error::ServiceError;

/// Octets of a window. Windows begin at multiples of this number.
const WINDOW: usize = 1 << 20;

/// Reads a file's windows in order.
pub(super) struct Windows {
    store: Arc<dyn Store>,
    upload: UploadId,
    size: u64,
    position: u64,
    /// Octets of the last chunk that were not returned yet.
    rest: Vec<u8>,
    /// Digests of all windows, where they are known from a first pass.
    expected: Option<Arc<[WindowDigest]>>,
}

/// SHA-256 of one window.
pub(super) type WindowDigest = [u8; 32];

impl Windows {
    /// From the beginning of the file.
    pub(super) fn new(store: Arc<dyn Store>, upload: UploadId, size: u64) -> Self {
        Self { store, upload, size, position: 0, rest: Vec::new(), expected: None }
    }

    /// From the window that holds octet `position` on. Each window is compared with its digest, so
    /// that nobody who can write the database can change what the first pass verified (I5).
    pub(super) fn verified(
        store: Arc<dyn Store>,
        upload: UploadId,
        size: u64,
        position: u64,
        digests: Arc<[WindowDigest]>,
    ) -> Self {
        Self {
            position: position - position % (WINDOW as u64),
            expected: Some(digests),
            ..Self::new(store, upload, size)
        }
    }

    /// Where the next window begins.
    pub(super) const fn position(&self) -> u64 {
        self.position
    }

    /// The next window; `None` at the end.
    ///
    /// # Errors
    /// Octets are missing in the spool, or are not those of the first pass; or the database cannot
    /// be reached.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, ServiceError> {
        let wanted = usize::try_from(self.size.saturating_sub(self.position)).unwrap_or(usize::MAX).min(WINDOW);
        if wanted == 0 {
            return Ok(None);
        }
        let mut window = Vec::with_capacity(wanted);
        while window.len() < wanted {
            if self.rest.is_empty() {
                let at = self.position + window.len() as u64;
                let chunk = self.store.shipment_chunk(self.upload, at).await?;
                let octets = chunk.and_then(|(begin, octets)| {
                    octets.get(usize::try_from(at.checked_sub(begin)?).ok()?..).map(<[u8]>::to_vec)
                });
                self.rest = octets.filter(|octets| !octets.is_empty()).ok_or_else(|| missing(at))?;
            }
            let taken = self.rest.len().min(wanted - window.len());
            window.extend(self.rest.drain(..taken));
        }
        if let Some(expected) = &self.expected {
            let number = usize::try_from(self.position / WINDOW as u64).unwrap_or(usize::MAX);
            if expected.get(number).is_none_or(|expected| digest_of(&window) != *expected) {
                return Err(changed());
            }
        }
        self.position += wanted as u64;
        Ok(Some(window))
    }
}

/// SHA-256 of a window.
pub(super) fn digest_of(window: &[u8]) -> WindowDigest {
    let mut value = [0; 32];
    value.copy_from_slice(digest::digest(&SHA256, window).as_ref());
    value
}

/// Divides octets into lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    partial: Vec<u8>,
    /// Where the line that is being read begins.
    begin: u64,
    position: u64,
    complete: u64,
}

/// A line without its line feed.
pub(super) struct Line<'a> {
    /// From 1.
    pub(super) number: u64,
    /// Its first octet in the file.
    pub(super) begin: u64,
    /// Its octets. A line that is too long is cut to one octet more than the longest line may have:
    /// the parser refuses it.
    pub(super) octets: &'a [u8],
    /// The part of it, with line feed, that stands in the piece that was pushed last. Earlier
    /// pieces hold the rest.
    pub(super) tail: &'a [u8],
}

impl Lines {
    /// Begins in the middle of a file: the next line is `number`, at octet `begin`.
    pub(super) fn starting_at(number: u64, begin: u64) -> Self {
        Self { partial: Vec::new(), begin, position: begin, complete: number.saturating_sub(1) }
    }

    /// Adds a piece, and calls `each` for every line that it completes. Returns the octets after
    /// the last line feed: the line continues in the next piece.
    ///
    /// # Errors
    /// The first error of `each`.
    pub(super) fn push<'a, E>(
        &mut self,
        mut octets: &'a [u8],
        mut each: impl FnMut(Line<'_>) -> Result<(), E>,
    ) -> Result<&'a [u8], E> {
        while let Some(end) = octets.iter().position(|octet| *octet == b'\n') {
            let (line, rest) = octets.split_at(end + 1);
            let content = line.get(..end).unwrap_or_default();
            self.position += line.len() as u64;
            self.complete += 1;
            let whole = if self.partial.is_empty() {
                content.get(..content.len().min(KEPT)).unwrap_or_default()
            } else {
                self.keep(content);
                &self.partial
            };
            each(Line { number: self.complete, begin: self.begin, octets: whole, tail: line })?;
            self.partial.clear();
            self.begin = self.position;
            octets = rest;
        }
        self.keep(octets);
        self.position += octets.len() as u64;
        Ok(octets)
    }

    /// The last line, if it had no line feed.
    pub(super) fn last(&self) -> Option<Line<'_>> {
        (self.position > self.begin).then_some(Line {
            number: self.complete + 1,
            begin: self.begin,
            octets: &self.partial,
            tail: &[],
        })
    }

    /// Where the line that is being read begins.
    pub(super) const fn begin(&self) -> u64 {
        self.begin
    }

    fn keep(&mut self, octets: &[u8]) {
        let room = KEPT.saturating_sub(self.partial.len()).min(octets.len());
        self.partial.extend_from_slice(octets.get(..room).unwrap_or_default());
    }
}

fn missing(at: u64) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!("octet {at} of the shipment is not in the spool"),
        next_step: "upload the file again".to_owned(),
    }
}

fn changed() -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: "the shipment in the spool changed after it was verified (I5)".to_owned(),
        next_step: "call the security officers, and upload the file again".to_owned(),
    }
}

/// One octet more than a line may have, so that a longer line is noticed.
const KEPT: usize = LONGEST_SHIPMENT_LINE + 1;

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(pieces: &[&[u8]]) -> Vec<(u64, u64, Vec<u8>)> {
        let mut lines = Lines::default();
        let mut found = Vec::new();
        for piece in pieces {
            lines
                .push(piece, |line| {
                    found.push((line.number, line.begin, line.octets.to_vec()));
                    Ok::<_, ()>(())
                })
                .unwrap();
        }
        found.extend(lines.last().map(|line| (line.number, line.begin, line.octets.to_vec())));
        found
    }

    #[test]
    fn lines_are_the_same_however_the_octets_arrive() {
        let file = b"one\n\nthree is longer\nfour";
        let whole = cut(&[file]);
        assert_eq!(
            whole,
            [
                (1, 0, b"one".to_vec()),
                (2, 4, Vec::new()),
                (3, 5, b"three is longer".to_vec()),
                (4, 21, b"four".to_vec())
            ]
        );
        for at in 0..file.len() {
            let (first, second) = file.split_at(at);
            assert_eq!(cut(&[first, second]), whole, "cut at {at}");
        }
        let single: Vec<&[u8]> = file.chunks(1).collect();
        assert_eq!(cut(&single), whole);
    }

    #[test]
    fn an_endless_line_takes_no_more_memory_than_the_longest() {
        let mut lines = Lines::default();
        let piece = vec![b'x'; 1 << 16];
        for _ in 0..64 {
            lines.push(&piece, |_| Err(())).unwrap();
        }
        assert_eq!(lines.partial.len(), KEPT);
        let mut seen = 0;
        lines
            .push(b"\nnext\n", |line| {
                seen += 1;
                assert_eq!(line.octets.len(), if line.number == 1 { KEPT } else { 4 });
                Ok::<_, ()>(())
            })
            .unwrap();
        assert_eq!((seen, lines.begin()), (2, (64 << 16) + 6));
    }
}
