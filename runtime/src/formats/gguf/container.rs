//! The container of a GGUF file: header, metadata and tensor table, versions 2 and 3.
//!
//! Nothing in it is believed before it is checked: counts against the bytes that are left, products for overflow,
//! offsets against the file's end and against each other. Arrays stay in the file and are read when asked for, so
//! that no count makes anything large.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::types::TensorType;
use crate::formats::{Bytes, FormatError};

pub(in crate::formats) const MAGIC: [u8; 4] = *b"GGUF";
/// What offsets of tensors are multiples of, unless `general.alignment` says otherwise.
pub(super) const ALIGNMENT: u64 = 32;
const MAX_DIMENSIONS: u32 = 4;
/// Longest name of a key or a tensor. The specification allows 65535 bytes for keys and 64 for tensors.
const MAX_NAME: usize = 1 << 16;

/// One value of the metadata.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// An array of the metadata, still in the file.
#[derive(Clone, Debug)]
pub(super) struct Array {
    kind: Kind,
    count: usize,
    bytes: Bytes,
}

/// Type of a value, as numbered in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// Bytes that one value takes at least.
    const fn least_bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12,
        }
    }
}

/// A row of the tensor table.
#[derive(Clone, Debug)]
pub(super) struct TensorInfo {
    pub(super) kind: TensorType,
    /// Rows first: the file has the dimensions in the other order.
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Bytes,
}

/// A parsed container.
pub(super) struct Container {
    pub(super) path: PathBuf,
    pub(super) metadata: HashMap<String, Value>,
    pub(super) tensors: HashMap<String, TensorInfo>,
}

impl Container {
    /// Parses and checks everything but the tensors' own bytes.
    pub(super) fn open(path: &Path, bytes: &Bytes) -> Result<Self, FormatError> {
        let damaged = |problem| FormatError::Gguf { path: path.to_owned(), problem };
        let mut reader = Reader { bytes, at: 0 };
        let (tensor_count, metadata_count) = read_counts(&mut reader).map_err(damaged)?;
        let metadata = read_metadata(&mut reader, metadata_count).map_err(damaged)?;
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(Value::Unsigned(alignment)) if alignment.is_power_of_two() && *alignment <= 1 << 20 => *alignment,
            Some(value) => return Err(damaged(format!("general.alignment is {value:?}, no power of two"))),
        };
        let rows = read_tensor_table(&mut reader, tensor_count).map_err(damaged)?;
        let data = (reader.at as u64).next_multiple_of(alignment);
        let mut places = Vec::with_capacity(rows.len());
        for row in &rows {
            let kind = TensorType::from_id(row.type_id, path, &row.name)?;
            places.push(place(row, kind, data, alignment, bytes.len()).map_err(damaged)?);
        }
        refuse_overlaps(&rows, &places).map_err(damaged)?;

        let mut tensors = HashMap::with_capacity(rows.len());
        for (row, place) in rows.into_iter().zip(places) {
            let Some(bytes) = bytes.slice(place.start..place.end) else {
                return Err(damaged(format!("tensor {} does not lie inside it", row.name)));
            };
            let shape = row.dimensions.into_iter().rev().collect();
            let info = TensorInfo { kind: place.kind, shape, bytes };
            if tensors.insert(row.name.clone(), info).is_some() {
                return Err(damaged(format!("tensor {} occurs twice", row.name)));
            }
        }
        Ok(Self { path: path.to_owned(), metadata, tensors })
    }
}

/// A tensor as the table has it.
struct Row {
    name: String,
    dimensions: Vec<usize>,
    type_id: u32,
    offset: u64,
}

struct Place {
    kind: TensorType,
    start: usize,
    end: usize,
}

/// Magic and version; returns the numbers of tensors and of metadata values.
fn read_counts(reader: &mut Reader<'_>) -> Result<(usize, usize), String> {
    if reader.take(4)? != MAGIC {
        return Err("it does not begin with GGUF".to_owned());
    }
    match reader.u32()? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 1..=3) => {
            return Err("it is big-endian, only little-endian files are read".to_owned());
        }
        version => return Err(format!("its version is {version}, only 2 and 3 are read")),
    }
    // The least that a tensor takes in the table: name's length, dimensions' number, type, offset. A value: the key's
    // length, its type, one byte.
    let (tensors, values) = (reader.u64()?, reader.u64()?);
    Ok((reader.bounded(tensors, 8 + 4 + 4 + 8, "tensors")?, reader.bounded(values, 8 + 4 + 1, "metadata values")?))
}

fn read_metadata(reader: &mut Reader<'_>, count: usize) -> Result<HashMap<String, Value>, String> {
    let mut metadata = HashMap::new();
    for _ in 0..count {
        let key = reader.name()?;
        let kind = reader.kind()?;
        let value = reader.value(kind).map_err(|problem| format!("{key}: {problem}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("{key} occurs twice"));
        }
    }
    Ok(metadata)
}

fn read_tensor_table(reader: &mut Reader<'_>, count: usize) -> Result<Vec<Row>, String> {
    let mut rows = Vec::new();
    for _ in 0..count {
        let name = reader.name()?;
        let dimensions = reader.u32()?;
        if dimensions == 0 || dimensions > MAX_DIMENSIONS {
            return Err(format!("tensor {name} has {dimensions} dimensions"));
        }
        let dimensions = (0..dimensions).map(|_| reader.u64()).collect::<Result<Vec<_>, _>>()?;
        let dimensions = dimensions.into_iter().map(usize::try_from).collect::<Result<Vec<_>, _>>();
        let dimensions = dimensions.map_err(|_| format!("tensor {name} is too large"))?;
        rows.push(Row { name, dimensions, type_id: reader.u32()?, offset: reader.u64()? });
    }
    Ok(rows)
}

/// Where a tensor's bytes lie in the file, `data` being where all of them begin.
fn place(row: &Row, kind: TensorType, data: u64, alignment: u64, length: usize) -> Result<Place, String> {
    let Row { name, dimensions, offset, .. } = row;
    if dimensions.contains(&0) {
        return Err(format!("tensor {name} has shape {dimensions:?}"));
    }
    if !offset.is_multiple_of(alignment) {
        return Err(format!("tensor {name} starts at {offset}, no multiple of {alignment}"));
    }
    let elements = dimensions.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
    let bytes = elements.and_then(|elements| kind.bytes(dimensions[0], elements));
    let bytes = bytes.ok_or_else(|| format!("tensor {name} of type {kind} cannot have shape {dimensions:?}"))?;
    let start = data.checked_add(*offset).and_then(|start| usize::try_from(start).ok());
    match start.and_then(|start| Some((start, start.checked_add(bytes)?))) {
        Some((start, end)) if end <= length => Ok(Place { kind, start, end }),
        _ => Err(format!("it is cut off: tensor {name} needs {bytes} bytes from {offset}, the file has {length}")),
    }
}

fn refuse_overlaps(rows: &[Row], places: &[Place]) -> Result<(), String> {
    let mut order: Vec<usize> = (0..places.len()).collect();
    order.sort_unstable_by_key(|at| places[*at].start);
    match order.windows(2).find(|pair| places[pair[0]].end > places[pair[1]].start) {
        None => Ok(()),
        Some(pair) => Err(format!("tensors {} and {} overlap", rows[pair[0]].name, rows[pair[1]].name)),
    }
}

/// Reads numbers and strings one after the other, never past the end.
struct Reader<'a> {
    bytes: &'a Bytes,
    at: usize,
}

impl Reader<'_> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, count: usize) -> Result<&[u8], String> {
        let start = self.at;
        if count > self.left() {
            return Err(format!("it is cut off: {count} more bytes are needed at {start}, it has {}", self.left()));
        }
        self.at += count;
        Ok(&self.bytes[start..self.at])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things that take at least `least` bytes each.
    fn bounded(&self, count: u64, least: usize, what: &str) -> Result<usize, String> {
        match usize::try_from(count) {
            Ok(count) if count <= self.left() / least => Ok(count),
            _ => Err(format!("it is cut off: {count} {what} do not fit into the {} bytes it has left", self.left())),
        }
    }

    fn string_bytes(&mut self) -> Result<&[u8], String> {
        let length = self.u64()?;
        let length = self.bounded(length, 1, "bytes of a string")?;
        self.take(length)
    }

    fn name(&mut self) -> Result<String, String> {
        let bytes = self.string_bytes()?;
        match std::str::from_utf8(bytes) {
            Ok(name) if !name.is_empty() && name.len() <= MAX_NAME && !name.contains(char::is_control) => {
                Ok(name.to_owned())
            }
            _ => Err("a name in it is no text".to_owned()),
        }
    }

    fn kind(&mut self) -> Result<Kind, String> {
        let id = self.u32()?;
        Kind::ALL.get(id as usize).copied().ok_or_else(|| format!("a value has type {id}, which does not exist"))
    }

    fn value(&mut self, kind: Kind) -> Result<Value, String> {
        Ok(match kind {
            Kind::U8 => Value::Unsigned(self.array::<1>()?[0].into()),
            Kind::I8 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            Kind::U16 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            Kind::I16 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            Kind::U32 => Value::Unsigned(self.u32()?.into()),
            Kind::I32 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            Kind::F32 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            Kind::Bool => match self.array()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(format!("{other} is neither true nor false")),
            },
            // Texts that are no UTF-8 are for people or damaged; what matters is compared with what is known.
            Kind::String => Value::String(String::from_utf8_lossy(self.string_bytes()?).into_owned()),
            Kind::U64 => Value::Unsigned(self.u64()?),
            Kind::I64 => Value::Signed(i64::from_le_bytes(self.array()?)),
            Kind::F64 => Value::Float(f64::from_le_bytes(self.array()?)),
            Kind::Array => Value::Array(self.metadata_array()?),
        })
    }

    fn metadata_array(&mut self) -> Result<Array, String> {
        let kind = self.kind()?;
        let count = self.u64()?;
        let count = self.bounded(count, kind.least_bytes(), "elements of an array")?;
        let start = self.at;
        match kind {
            Kind::Array => return Err("an array of arrays means nothing here".to_owned()),
            Kind::String => {
                for _ in 0..count {
                    self.string_bytes()?;
                }
            }
            // `bounded` has checked the product.
            kind => drop(self.take(count * kind.least_bytes())?),
        }
        let bytes = self.bytes.slice(start..self.at).ok_or("an array does not lie inside it")?;
        Ok(Array { kind, count, bytes })
    }
}

impl Array {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// The strings, or `None` if it holds something else. What is no UTF-8 is replaced.
    pub(super) fn strings(&self) -> Option<impl Iterator<Item = String>> {
        (self.kind == Kind::String).then(|| {
            let mut reader = Reader { bytes: &self.bytes, at: 0 };
            (0..self.count)
                .map_while(move |_| reader.string_bytes().ok().map(|bytes| String::from_utf8_lossy(bytes).into_owned()))
        })
    }

    /// The numbers, or `None` if it holds something else.
    pub(super) fn numbers(&self) -> Option<impl Iterator<Item = f64>> {
        let number = !matches!(self.kind, Kind::String | Kind::Array);
        number.then(|| {
            let mut reader = Reader { bytes: &self.bytes, at: 0 };
            (0..self.count).map_while(move |_| match reader.value(self.kind).ok()? {
                Value::Unsigned(value) => Some(value as f64),
                Value::Signed(value) => Some(value as f64),
                Value::Float(value) => Some(value),
                Value::Bool(value) => Some(f64::from(u8::from(value))),
                Value::String(_) | Value::Array(_) => None,
            })
        })
    }
}
