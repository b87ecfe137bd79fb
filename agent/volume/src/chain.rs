//! Which of the given files are the volume: from the bottom along the successors to the head.
//!
//! A merge leaves two states behind that are right and look odd until it has tidied up: a layer whose `parent` is the
//! one that was merged away between it and the layer below, and a bottom above an older one (`merge.rs`).

use crate::{
    error::OpenError,
    header::{Header, HeaderError, HeaderState},
    layer,
    media::Media,
    stack::LAYERS_MAX,
    volume::Access,
};

/// Whether `header` may follow the layer `below` that names it: its parent is that, or was merged away between them.
pub(crate) fn stands_on(header: &Header, below: u64) -> bool {
    header.parent.is_some_and(|parent| parent >= below)
}

/// The newest layer without a parent: older ones were merged into it. Else the error of the first file.
pub(crate) fn bottom(headers: &[Result<Header, HeaderError>]) -> Result<(usize, Header), OpenError> {
    let bottoms = headers.iter().enumerate().rev();
    let found = bottoms.filter_map(|(index, header)| Some((index, header.as_ref().ok()?)));
    if let Some((index, header)) = found.clone().find(|(_, header)| header.parent.is_none()) {
        return Ok((index, header.clone()));
    }
    match headers.first() {
        None => Err(OpenError::Empty),
        Some(Err(source)) => Err(OpenError::Header { index: 0, source: source.clone() }),
        Some(Ok(first)) => Err(OpenError::Chain(format!(
            "no layer without a parent was given; the first is layer {}",
            first.layer
        ))),
    }
}

/// Follows the headers from the bottom to the head, or to the snapshot that was asked for. Positions in `files`
/// with their headers, bottom first.
pub(crate) fn walk(
    files: &[(Media, Media)],
    access: Access,
    snapshot: Option<&str>,
) -> Result<Vec<(usize, Header)>, OpenError> {
    let headers: Vec<Result<Header, HeaderError>> =
        files.iter().map(|(_, map)| layer::read_header(map)).collect();
    let (index, bottom) = bottom(&headers)?;
    let mut chain = vec![(index, bottom)];
    loop {
        let (_, top) = chain.last().expect("it starts with the bottom");
        if snapshot.is_some_and(|name| top.state != HeaderState::Head && top.snapshot == name) {
            return Ok(chain);
        }
        let HeaderState::Sealed { successor } = top.state else { break };
        let next = headers.iter().enumerate().find_map(|(index, header)| {
            let header = header.as_ref().ok()?;
            let fits =
                header.layer == successor && header.volume == top.volume && stands_on(header, top.layer);
            fits.then(|| (index, header.clone()))
        });
        match next {
            Some(next) => chain.push(next),
            // The layers below a point are enough to read it.
            None if access == Access::ReadOnly && snapshot.is_none() => break,
            None => return Err(missing(top.layer, successor, &headers)),
        }
        if chain.len() > LAYERS_MAX {
            return Err(OpenError::TooManyLayers(chain.len()));
        }
    }
    match snapshot {
        Some(name) => Err(OpenError::NoSuchSnapshot(name.to_owned())),
        None => Ok(chain),
    }
}

/// The best reason why a successor is not there: a damaged header if there is one.
fn missing(layer: u64, successor: u64, headers: &[Result<Header, HeaderError>]) -> OpenError {
    let damaged = headers.iter().enumerate().find_map(|(i, h)| Some((i, h.as_ref().err()?)));
    match damaged {
        Some((index, source)) => OpenError::Header { index, source: source.clone() },
        None => {
            OpenError::Chain(format!("layer {layer} is sealed, and its successor {successor} is missing"))
        }
    }
}
