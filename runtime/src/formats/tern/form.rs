//! What a prepared file is to look like: layouts, the head's type, and what is stored beside the model.

use ternion_compiler::Layout;

use super::{Content, Part};
use crate::formats::{ModelConfig, Projection, RowType};
use crate::screen::Shape;

/// `layout(layer, projection, m, k)` chooses how a ternary matrix is packed.
pub type ChooseLayout<'a> = dyn Fn(usize, Projection, usize, usize) -> Layout + 'a;

/// How the head's rows are stored; where the head is the embedding, the embedding's.
///
/// Another type than the model's own is part of what results depend on: the rounded rows are the model's head then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HeadType {
    /// As the model has them: nothing is rounded.
    #[default]
    Own,
    /// 16 bits per weight.
    F16,
    /// 8 bits per weight and a scale for each row.
    Int8,
    /// 6.6 bits per weight. Rows are multiples of 256.
    Q6K,
}

impl HeadType {
    pub(crate) const fn of(self, own: RowType) -> RowType {
        match self {
            Self::Own => own,
            Self::F16 => RowType::F16,
            Self::Int8 => RowType::Int8,
            Self::Q6K => RowType::Q6K,
        }
    }
}

/// What a prepared file is to look like, apart from the layouts of its matrices. Only the head's type is part of what
/// results depend on; the rest saves time and memory when the model is loaded.
#[derive(Clone, Debug, Default)]
pub struct Form {
    /// Type of the head's rows.
    pub head: HeadType,
    /// Whether to store the head's screen.
    pub screen: bool,
    /// Shapes `[m, k]` whose matrices are stored a second time, and in which layout.
    pub copies: Vec<((usize, usize), Layout)>,
    /// Layouts of the up-projections' rows and of the down-projections' columns as records, if they are to be stored.
    pub records: Option<[Layout; 2]>,
}

impl From<HeadType> for Form {
    fn from(head: HeadType) -> Self {
        Self { head, ..Self::default() }
    }
}

impl Form {
    /// What a section that is not the model itself holds; `None` if it is not to be there.
    pub(super) fn content(&self, part: Part, config: &ModelConfig) -> Option<Content> {
        let records = |at: usize| {
            let [rows, columns] = self.records?;
            Some(Content::Packed { m: config.ffn, k: config.hidden, layout: [rows, columns][at] })
        };
        match part {
            Part::Screen => self.screen.then(|| Content::Screen(Shape::new(config.vocabulary, config.hidden))),
            Part::Copy(_, projection) => {
                let (m, k) = projection.shape(config);
                let (_, layout) = self.copies.iter().find(|(shape, _)| *shape == (m, k))?;
                Some(Content::Packed { m, k, layout: *layout })
            }
            Part::Rows(_) => records(0),
            Part::Columns(_) => records(1),
            _ => None,
        }
    }
}
