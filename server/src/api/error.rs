//! Errors as OpenAI's clients understand them.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::engine::{Failure, Refused};

/// Why a request was not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    code: Code,
    message: String,
    param: Option<String>,
    retry_after: Option<u64>,
}

/// The error's code, put among a response's extensions so that it can be counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub &'static str);

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code: Code(code), message: message.into(), param: None, retry_after: None }
    }

    /// A field holds what it may not.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("{param}: {}", message.into());
        Self { param: Some(param), ..Self::new(StatusCode::BAD_REQUEST, "INVALID_INPUT", message) }
    }

    /// The request as a whole is not right.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "INVALID_INPUT", message)
    }

    /// The body is too large.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("the body has more than {limit} bytes: send less at once");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "INVALID_INPUT", message)
    }

    /// The body took too long to arrive.
    pub fn slow() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "TIMEOUT", "the body took too long to arrive: send it at once")
    }

    /// No such model.
    pub fn no_model(name: &str, known: &[&str]) -> Self {
        let message = format!("there is no model {name:?} here: ask for one of {}", known.join(", "));
        let error = Self::new(StatusCode::NOT_FOUND, "MODEL_NOT_FOUND", message);
        Self { param: Some("model".to_owned()), ..error }
    }

    /// No such path.
    pub fn no_route() -> Self {
        Self::new(StatusCode::NOT_FOUND, "INVALID_INPUT", "nothing is served at this path: see /openapi.json")
    }

    /// The path is there, but for another method.
    pub fn no_method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "INVALID_INPUT", "this path takes another method: see /openapi.json")
    }

    /// The key is missing or wrong.
    pub fn unauthorised() -> Self {
        let message = "a valid key is needed: send it as `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "INVALID_API_KEY", message)
    }

    /// The key does not open this.
    pub fn forbidden() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "FORBIDDEN",
            "this needs a key with the role `admin`, or without keys a local client",
        )
    }

    /// A page from elsewhere asks.
    pub fn foreign() -> Self {
        Self::new(StatusCode::FORBIDDEN, "FORBIDDEN", "pages from other origins may not ask this server: see --cors")
    }

    /// The server is asked under a name that it does not have.
    pub fn unknown_host() -> Self {
        let message = "this server is asked by address, as localhost, or under a name that --allow-host gives it: the \
                       Host of this request is none of these";
        Self::new(StatusCode::FORBIDDEN, "FORBIDDEN", message)
    }

    /// Too many requests by this client.
    pub fn rate_limited(seconds: u64) -> Self {
        let message = format!("too many requests: wait {seconds} s");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "RATE_LIMIT_EXCEEDED", message);
        Self { retry_after: Some(seconds), ..error }
    }

    /// The content filter does not let the request pass.
    pub fn filtered() -> Self {
        Self::new(StatusCode::BAD_REQUEST, "CONTENT_FILTERED", "the request matches this server's content filter")
    }

    /// A bug, or a system that does not do what it must.
    pub fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL", "the server made a mistake: please report it")
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// Its code.
    #[must_use]
    pub const fn code(&self) -> Code {
        self.code
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        json!({"error": {
            "message": self.message, "type": self.kind(), "param": self.param, "code": self.code.0,
        }})
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let message = match refused {
            Refused::Full => "too many requests are waiting: try again",
            Refused::Draining => "the server is about to stop: try again",
        };
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "OVERLOADED", message);
        Self { retry_after: Some(1), ..error }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Timeout => {
                let message = "the answer took longer than this server allows: ask for fewer tokens or try again";
                Self::new(StatusCode::GATEWAY_TIMEOUT, "TIMEOUT", message)
            }
            Failure::Draining => Refused::Draining.into(),
            Failure::Memory => {
                let message = "there is no memory for this text: try again, or ask for fewer tokens";
                let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "OVERLOADED", message);
                Self { retry_after: Some(1), ..error }
            }
            Failure::Grammar => Self::field(
                "response_format",
                "this schema cannot be followed: no text conforms to it, or it is too hard to follow",
            ),
            Failure::Internal => Self::internal(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.json())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(self.code);
        response
    }
}
