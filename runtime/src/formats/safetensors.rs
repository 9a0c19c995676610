//! The tensors of a Hugging Face directory: one safetensors file, or shards with an index.
//!
//! Files are mapped, headers are read when opening, tensors only when asked for. The `safetensors` crate parses and
//! validates headers (offsets without gaps or overlaps, sizes that fit shape and type); what it lets through is
//! checked here first: a name that occurs twice, and offsets past the end of the file.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, de::IgnoredAny};

use super::error::brief;
use super::{Bytes, FormatError};

/// One tensor of a file, not looked into yet.
pub(crate) struct RawTensor {
    /// The file it lies in.
    pub(crate) path: PathBuf,
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Bytes,
}

/// All tensors of a directory, by name.
pub(crate) struct Tensors {
    /// What to blame for a missing tensor: the file, or the index of the shards.
    path: PathBuf,
    files: Vec<File>,
    /// Which file a tensor lies in.
    places: HashMap<String, usize>,
}

struct File {
    path: PathBuf,
    bytes: Bytes,
    /// Where the tensors' bytes begin.
    data: usize,
    tensors: HashMap<String, safetensors::tensor::TensorInfo>,
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

impl Tensors {
    /// Opens `model.safetensors`, or the shards of `model.safetensors.index.json`.
    ///
    /// # Errors
    /// A missing or damaged file.
    pub(super) fn open(directory: &Path) -> Result<Self, FormatError> {
        let (single, index) = (directory.join(SINGLE), directory.join(INDEX));
        if single.is_file() {
            Self::open_file(single)
        } else if index.is_file() {
            Self::open_shards(directory, index)
        } else {
            Err(FormatError::NotAModel { path: directory.to_owned(), missing: SINGLE })
        }
    }

    /// Opens one file.
    ///
    /// # Errors
    /// If it is missing or damaged.
    pub(crate) fn open_file(path: PathBuf) -> Result<Self, FormatError> {
        let file = File::open(path.clone())?;
        let places = file.tensors.keys().map(|name| (name.clone(), 0)).collect();
        Ok(Self { path, files: vec![file], places })
    }

    fn open_shards(directory: &Path, path: PathBuf) -> Result<Self, FormatError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: HashMap<String, String>,
        }
        let text = std::fs::read(&path).map_err(|source| FormatError::Read { path: path.clone(), source })?;
        let index: Index = serde_json::from_slice(&text)
            .map_err(|error| FormatError::Json { path: path.clone(), problem: brief(error) })?;

        let mut shards: Vec<&String> = index.weight_map.values().collect();
        shards.sort_unstable();
        shards.dedup();
        let mut files = Vec::with_capacity(shards.len());
        for shard in &shards {
            // A shard is a plain file name: an index must not lead anywhere else.
            if Path::new(shard).file_name().is_none_or(|name| name != shard.as_str()) {
                return Err(FormatError::Field {
                    path,
                    field: "weight_map".to_owned(),
                    problem: format!("names {:?}, which is no file of this directory", brief(shard)),
                });
            }
            files.push(File::open(directory.join(shard))?);
        }
        let mut places = HashMap::with_capacity(index.weight_map.len());
        for (tensor, shard) in &index.weight_map {
            // Found, since `shards` is made of these very names.
            let place = shards.partition_point(|other| *other < shard);
            if !files[place].tensors.contains_key(tensor) {
                return Err(FormatError::MissingTensor { path: files[place].path.clone(), tensor: brief(tensor) });
            }
            places.insert(tensor.clone(), place);
        }
        Ok(Self { path, files, places })
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Names of all tensors, in no order.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    pub(crate) fn get(&self, name: &str) -> Result<RawTensor, FormatError> {
        let missing = || FormatError::MissingTensor { path: self.path.clone(), tensor: brief(name) };
        let file = &self.files[*self.places.get(name).ok_or_else(missing)?];
        let info = file.tensors.get(name).ok_or_else(missing)?;
        let (start, end) = info.data_offsets;
        Ok(RawTensor {
            path: file.path.clone(),
            name: name.to_owned(),
            dtype: info.dtype,
            shape: info.shape.clone(),
            bytes: file.bytes.slice(file.data + start..file.data + end).ok_or_else(missing)?,
        })
    }
}

impl File {
    fn open(path: PathBuf) -> Result<Self, FormatError> {
        let bytes = Bytes::map(&path)?;
        match read_header(&bytes) {
            Ok((data, tensors)) => Ok(Self { path, bytes, data, tensors }),
            Err(problem) => Err(FormatError::Safetensors { path, problem: brief(problem) }),
        }
    }
}

type TensorInfos = HashMap<String, safetensors::tensor::TensorInfo>;

/// Returns where the tensors' bytes begin, and the tensors.
fn read_header(bytes: &[u8]) -> Result<(usize, TensorInfos), String> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(format!("{} bytes are too few for a header", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    let Some((header, data)) = usize::try_from(length).ok().and_then(|length| rest.split_at_checked(length)) else {
        return Err(format!("its header of {length} bytes reaches beyond its end at {}", bytes.len()));
    };
    let Extents(extents) = serde_json::from_slice(header).map_err(|error| format!("its header: {error}"))?;
    for (name, end) in &extents {
        if usize::try_from(*end).map_or(true, |end| end > data.len()) {
            let has = data.len();
            return Err(format!("it is cut off: tensor {name} ends at byte {end} of the data, which has {has}"));
        }
    }
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
    Ok((8 + header, tensors))
}

/// Where each tensor of a header ends; deserialising it refuses a name that occurs twice.
struct Extents(HashMap<String, u64>);

impl<'de> Deserialize<'de> for Extents {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Extent {
            data_offsets: (u64, u64),
        }
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Extents;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Extents, A::Error> {
                let mut extents = HashMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    match extents.entry(name) {
                        Entry::Occupied(twice) => {
                            return Err(de::Error::custom(format_args!("tensor {} occurs twice", twice.key())));
                        }
                        Entry::Vacant(place) => place.insert(map.next_value::<Extent>()?.data_offsets.1),
                    };
                }
                Ok(Extents(extents))
            }
        }
        deserializer.deserialize_map(Names)
    }
}

#[cfg(test)]
mod tests {
    use super::read_header;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn a_sound_header_gives_its_tensors() {
        let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}"#;
        let (data, tensors) = read_header(&file(header, 12)).unwrap();
        assert_eq!(data, 8 + header.len());
        assert_eq!(tensors["a"].shape, [2, 3]);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let tensor = |name: &str, shape: &str, offsets: &str| {
            format!(r#""{name}":{{"dtype":"U8","shape":[{shape}],"data_offsets":[{offsets}]}}"#)
        };
        for (header, data, message) in [
            (format!("{{{},{}}}", tensor("a", "4", "0,4"), tensor("a", "2,2", "0,4")), 4, "occurs twice"),
            (format!("{{{},{}}}", tensor("a", "4", "0,4"), tensor("b", "4", "2,6")), 6, "offset"),
            (format!("{{{}}}", tensor("a", "4", "0,5")), 5, "invalid shape"),
            (format!("{{{}}}", tensor("a", "4", "0,4")), 3, "cut off"),
            (format!("{{{}}}", tensor("a", "4", "0,4")), 5, "not fully covered"),
            (format!("{{{}}}", tensor("a", "4", "4,0")), 4, "offset"),
            (format!("{{{}}}", tensor("a", "9223372036854775807,4", "0,4")), 4, "overflow"),
            (format!("{{{}}}", tensor("a", "4", "0,18446744073709551615")), 4, "cut off"),
            ("[1]".to_owned(), 0, "header"),
        ] {
            let problem = read_header(&file(&header, data)).unwrap_err();
            assert!(problem.contains(message), "{header}: {problem}");
        }
        assert!(read_header(&[0; 7]).unwrap_err().contains("too few"));
        assert!(read_header(&u64::MAX.to_le_bytes()).unwrap_err().contains("beyond its end"));
    }
}
