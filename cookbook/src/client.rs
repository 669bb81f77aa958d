//! A client of the completions API: sampling rollouts and scoring prompts.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use towline_core::{Error, Result, SnapshotId};

/// How long one answer may take.
const DEADLINE: Duration = Duration::from_secs(120);

/// `/v1/completions` of one server.
#[derive(Debug, Clone)]
pub struct Completions {
    http: reqwest::Client,
    url: String,
}

/// A request for samples.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "all that a rollout asks for, named at the call")]
pub struct SampleRequest {
    /// Token prompts.
    pub prompts: Vec<Vec<u32>>,
    /// Samples of each.
    pub n: usize,
    /// Tokens of each sample at most.
    pub max_tokens: usize,
    /// Equal seeds on equal weights give equal samples.
    pub seed: u64,
}

/// One sample.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Sampled {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// The log-prob of each under the sampled distribution.
    pub logprobs: Vec<f32>,
    /// The snapshot that produced it.
    pub snapshot: String,
}

#[derive(Debug, Deserialize)]
struct Answer {
    choices: Vec<Choice>,
    snapshot: String,
    digest: String,
}

#[derive(Debug, Deserialize)]
struct Choice {
    tokens: Vec<u32>,
    logprobs: Logprobs,
}

#[derive(Debug, Deserialize)]
struct Logprobs {
    token_logprobs: Vec<Option<f32>>,
}

impl Completions {
    /// A client of the server at `url`.
    ///
    /// # Errors
    /// `Invalid` if no HTTP client can be built.
    pub fn new(url: &str) -> Result<Self> {
        let http = towline_deploy::http_client(url, DEADLINE)?;
        Ok(Self { http, url: format!("{}/v1/completions", url.trim_end_matches('/')) })
    }

    /// Samples at temperature 1; the outer list follows the prompts.
    ///
    /// # Errors
    /// `Unavailable` if the server does not answer; its own errors.
    pub async fn sample(&self, request: &SampleRequest) -> Result<Vec<Vec<Sampled>>> {
        let body = json!({
            "prompt": request.prompts, "n": request.n, "max_tokens": request.max_tokens, "temperature": 1.0,
            "seed": request.seed, "logprobs": 1,
        });
        let answer = self.ask(&body).await?;
        let wanted = request.prompts.len() * request.n;
        if answer.choices.len() != wanted {
            return Err(Error::internal(format!("wanted {wanted} samples, found {}", answer.choices.len())));
        }
        let samples: Vec<_> = answer
            .choices
            .into_iter()
            .map(|choice| Sampled {
                tokens: choice.tokens,
                logprobs: choice.logprobs.token_logprobs.into_iter().flatten().collect(),
                snapshot: answer.snapshot.clone(),
            })
            .collect();
        Ok(samples.chunks(request.n.max(1)).map(<[Sampled]>::to_vec).collect())
    }

    /// The log-prob of each token given those before it (the first is 0), from the weights of `snapshot`.
    ///
    /// # Errors
    /// As [`Completions::sample`]; `Conflict` if other weights answered.
    pub async fn score(&self, tokens: &[u32], snapshot: &SnapshotId) -> Result<Vec<f32>> {
        let body = json!({"prompt": tokens, "max_tokens": 0, "echo": true, "logprobs": 1});
        let answer = self.ask(&body).await?;
        if answer.snapshot != snapshot.identity.as_str() || answer.digest != snapshot.digest.to_string() {
            return Err(Error::conflict(format!(
                "wanted an answer of {snapshot}, {} answered",
                answer.snapshot
            )));
        }
        let scores = answer.choices.into_iter().next().map(|choice| choice.logprobs.token_logprobs);
        let scores = scores.ok_or_else(|| Error::internal("the server scored nothing"))?;
        Ok(scores.into_iter().map(|score| score.unwrap_or(0.0)).collect())
    }

    async fn ask(&self, body: &Value) -> Result<Answer> {
        let failed = |error: reqwest::Error| {
            Error::unavailable(format!("{} does not answer", self.url))
                .with_help("check that the server runs")
                .with_source(error)
        };
        let response = self.http.post(&self.url).json(body).send().await.map_err(failed)?;
        let status = response.status();
        let bytes = response.bytes().await.map_err(failed)?;
        if !status.is_success() {
            let text: String = String::from_utf8_lossy(&bytes).chars().take(500).collect();
            return Err(Error::unavailable(format!("{} answers {status}: {text}", self.url)));
        }
        serde_json::from_slice(&bytes).map_err(|error| {
            Error::internal(format!("{} answers in another form", self.url)).with_source(error)
        })
    }
}
