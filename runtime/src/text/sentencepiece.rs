//! SentencePiece's `tokenizer.model`, of the kind that Llama 2's tokenizer is: BPE with byte fallback. It becomes a
//! `tokenizer.json`.

use prost::Message;

use super::vocabulary::{TokenKind, sentencepiece_json};

/// The parts of `sentencepiece_model.proto` that matter here.
#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
}

/// `TrainerSpec.ModelType.BPE`
const BPE: i32 = 2;

/// A token that was added to the vocabulary afterwards.
pub(crate) struct AddedToken {
    pub(crate) id: usize,
    pub(crate) text: String,
    pub(crate) special: bool,
}

/// The `tokenizer.json` of a `tokenizer.model` and the tokens added to it.
///
/// # Errors
/// What is wrong or not supported, as the end of a sentence about the file.
pub(crate) fn tokenizer_json(model: &[u8], mut added: Vec<AddedToken>) -> Result<Vec<u8>, String> {
    let model = ModelProto::decode(model).map_err(|error| format!("is no SentencePiece model ({error})"))?;
    let trainer = model.trainer.unwrap_or_default();
    let normalizer = model.normalizer.unwrap_or_default();
    // Defaults are those of the definition.
    if trainer.model_type.unwrap_or(1) != BPE {
        return Err("is no BPE model, the only kind of SentencePiece model that is supported".to_owned());
    }
    if !trainer.byte_fallback.unwrap_or(false) {
        return Err("has no byte fallback, without which texts would be lost".to_owned());
    }
    if normalizer.precompiled_charsmap.is_some_and(|map| !map.is_empty())
        || normalizer.remove_extra_whitespaces.unwrap_or(true)
    {
        return Err("changes texts before it encodes them, which is not supported".to_owned());
    }
    let mut tokens = Vec::with_capacity(model.pieces.len());
    let mut scores = Vec::with_capacity(model.pieces.len());
    for piece in model.pieces {
        let kind = TokenKind::from_number(piece.kind.unwrap_or(1).cast_unsigned());
        tokens.push((piece.piece.unwrap_or_default(), kind));
        scores.push(piece.score.unwrap_or(0.0));
    }
    added.sort_by_key(|token| token.id);
    for token in added {
        let kind = if token.special { TokenKind::Control } else { TokenKind::UserDefined };
        if let Some((piece, place)) = tokens.get_mut(token.id) {
            if *piece == token.text {
                *place = kind;
            }
        } else if token.id == tokens.len() {
            tokens.push((token.text, kind));
            scores.push(0.0);
        } else {
            return Err(format!("ends at token {}, but a token {} was added", tokens.len(), token.id));
        }
    }
    Ok(sentencepiece_json(&tokens, &scores, normalizer.add_dummy_prefix.unwrap_or(true)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(change: impl Fn(&mut ModelProto)) -> Result<Vec<u8>, String> {
        let mut model = ModelProto {
            pieces: vec![Piece { piece: Some("<unk>".to_owned()), score: None, kind: Some(2) }],
            trainer: Some(TrainerSpec { model_type: Some(BPE), byte_fallback: Some(true) }),
            normalizer: Some(NormalizerSpec { remove_extra_whitespaces: Some(false), ..NormalizerSpec::default() }),
        };
        change(&mut model);
        tokenizer_json(&model.encode_to_vec(), Vec::new())
    }

    #[test]
    fn kinds_that_would_change_texts_are_refused() {
        model(|_| {}).unwrap();
        let refused = |change: &dyn Fn(&mut ModelProto)| model(change).unwrap_err();
        assert!(refused(&|model| model.trainer = None).contains("BPE"));
        assert!(refused(&|model| model.normalizer = None).contains("changes texts"));
        assert!(
            refused(&|model| model.trainer = Some(TrainerSpec { model_type: Some(BPE), byte_fallback: None }))
                .contains("byte fallback")
        );
        assert!(tokenizer_json(b"\x0a\xff", Vec::new()).unwrap_err().contains("SentencePiece"));
    }
}
