//! `/v1/completions`: text or token prompts, several of them, several samples each, log-probs, prompt scoring.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use towline_core::{Error, Result};

use super::state::{Served, Shared};
use super::{REQUEST_DEADLINE, answer};
use crate::engine::{self, ByteTokenizer, Prefix, Sample, SampleParams};

/// Prompts of one request.
const MAX_PROMPTS: usize = 256;
/// Samples of one request: prompts times `n`.
const MAX_SAMPLES: usize = 2048;

/// A completion request. Unknown fields are ignored, as OpenAI's clients send many.
#[derive(Debug, Deserialize)]
struct Request {
    prompt: Prompts,
    #[serde(default = "sixteen")]
    max_tokens: usize,
    #[serde(default = "one")]
    temperature: f64,
    #[serde(default = "single")]
    n: usize,
    seed: Option<u64>,
    /// `null`, `false` or a number; a number asks for log-probs.
    logprobs: Option<Logprobs>,
    /// Puts the prompt before the answer; with log-probs, scores it by one full forward pass.
    #[serde(default)]
    echo: bool,
    /// Text whose first token ends an answer.
    stop: Option<Stop>,
    model: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Logprobs {
    Flag(bool),
    Count(#[expect(dead_code, reason = "any number asks for the log-probs of the chosen tokens")] u32),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Serialize)]
struct Answer {
    id: String,
    object: &'static str,
    model: String,
    choices: Vec<Choice>,
    usage: Usage,
    /// The weights that produced every token of this answer.
    snapshot: String,
    digest: String,
    /// How often the server's weights were swapped while this answer was made.
    swaps_during: u64,
}

#[derive(Debug, Serialize)]
struct Choice {
    index: usize,
    text: String,
    tokens: Vec<u32>,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<ChoiceLogprobs>,
}

#[derive(Debug, Serialize)]
struct ChoiceLogprobs {
    /// `null` for the first token of an echoed prompt, which nothing predicts.
    token_logprobs: Vec<Option<f32>>,
}

#[derive(Debug, Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
}

#[derive(Debug, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

fn sixteen() -> usize {
    16
}

fn one() -> f64 {
    1.0
}

fn single() -> usize {
    1
}

pub(super) async fn complete(State(shared): State<Arc<Shared>>, body: Bytes) -> Response {
    match respond(&shared, &body).await {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => answer::refuse(&error),
    }
}

async fn respond(shared: &Arc<Shared>, body: &[u8]) -> Result<Answer> {
    let request: Request = answer::parse(body)?;
    if let Some(model) = &request.model
        && *model != shared.options.model
    {
        return Err(Error::not_found(format!("`{model}` is not served here, `{}` is", shared.options.model)));
    }
    let swaps = shared.swaps();
    // Taken once: the request keeps these weights to its end, whatever is swapped meanwhile.
    let served = shared
        .served()
        .ok_or_else(|| Error::unavailable("no weights are loaded yet").with_help("hot-load a base first"))?;
    let cancelled = Arc::new(Cancel::default());
    let guard = CancelOnDrop(Arc::clone(&cancelled));
    let worker = Arc::clone(shared);
    let work = tokio::task::spawn_blocking(move || run(&worker, &served, request, &cancelled));
    let outcome = tokio::time::timeout(REQUEST_DEADLINE, work).await;
    drop(guard);
    let mut answer = outcome
        .map_err(|_| Error::timed_out(format!("the answer took more than {} s", REQUEST_DEADLINE.as_secs())))?
        .map_err(|error| Error::internal("the sampler panicked").with_source(error))??;
    answer.swaps_during = shared.swaps() - swaps;
    Ok(answer)
}

/// Ends the sampling of a request whose client has gone.
#[derive(Debug, Default)]
struct Cancel(AtomicBool);

struct CancelOnDrop(Arc<Cancel>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

fn run(shared: &Shared, served: &Served, request: Request, cancel: &Cancel) -> Result<Answer> {
    let number = shared.next_request();
    let wants_logprobs = match request.logprobs {
        Some(Logprobs::Flag(flag)) => flag,
        Some(Logprobs::Count(_)) => true,
        None => false,
    };
    let prompts = request.prompt.tokens()?;
    if request.n == 0 || prompts.len().saturating_mul(request.n) > MAX_SAMPLES {
        return Err(Error::invalid(format!(
            "{} prompts with n = {}: wanted 1 to {MAX_SAMPLES} samples in all",
            prompts.len(),
            request.n
        )));
    }
    let stop = match &request.stop {
        None => Vec::new(),
        Some(Stop::One(text)) => stop_tokens(std::slice::from_ref(text)),
        Some(Stop::Many(texts)) => stop_tokens(texts),
    };
    let params = SampleParams::new(request.max_tokens)
        .with_temperature(request.temperature)
        .with_seed(request.seed.unwrap_or_else(|| arbitrary(number)))
        .with_stop(stop);
    let mut cached_tokens = 0;
    let mut go_on = || !cancel.0.load(Ordering::Relaxed);
    let samples = if request.max_tokens == 0 {
        vec![vec![]; prompts.len()]
    } else {
        let prefixes = prompts
            .iter()
            .map(|prompt| read(shared, served, prompt, &mut cached_tokens))
            .collect::<Result<Vec<_>>>()?;
        let prefixes: Vec<&Prefix> = prefixes.iter().map(AsRef::as_ref).collect();
        engine::sample_prefixes_while(served.model(), &prefixes, request.n, &params, &mut go_on)?
    };
    let mut choices = Vec::new();
    for (prompt, samples) in prompts.iter().zip(samples) {
        let echoed = match (request.echo, wants_logprobs) {
            (false, _) => None,
            (true, false) => Some(Vec::new()),
            (true, true) => Some(engine::score(served.model(), prompt)?),
        };
        let none = (samples.is_empty() && request.echo).then(empty_sample);
        for sample in samples.into_iter().chain(none) {
            choices.push(choice(choices.len(), prompt, echoed.as_deref(), &sample, wants_logprobs));
        }
    }
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    let all_tokens: usize = choices.iter().map(|choice| choice.tokens.len()).sum();
    let completion_tokens =
        all_tokens - if request.echo { prompt_tokens * request.n } else { 0 }.min(all_tokens);
    Ok(Answer {
        id: format!("cmpl-{number}"),
        object: "text_completion",
        model: shared.options.model.clone(),
        choices,
        usage: Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens },
        },
        snapshot: served.id().identity.to_string(),
        digest: served.id().digest.to_string(),
        swaps_during: 0,
    })
}

/// Reads a prompt, from the longest beginning that these weights have read before.
fn read(shared: &Shared, served: &Served, prompt: &[u32], cached: &mut usize) -> Result<Arc<Prefix>> {
    let salt = served.salt();
    let prefix = match shared.prefixes.longest(salt, prompt) {
        Some(found) if found.tokens().len() == prompt.len() => {
            *cached += prompt.len();
            return Ok(found);
        }
        Some(found) => {
            *cached += found.tokens().len();
            found.extended(served.model(), prompt.get(found.tokens().len()..).unwrap_or_default())?
        }
        None => engine::prefill(served.model(), prompt)?,
    };
    let prefix = Arc::new(prefix);
    shared.prefixes.insert(salt, Arc::clone(&prefix));
    Ok(prefix)
}

fn choice(
    index: usize,
    prompt: &[u32],
    echoed: Option<&[f32]>,
    sample: &Sample,
    wants_logprobs: bool,
) -> Choice {
    let mut tokens = Vec::new();
    let mut logprobs = Vec::new();
    if let Some(scores) = echoed {
        tokens.extend_from_slice(prompt);
        logprobs.extend(scores.iter().enumerate().map(|(at, &score)| (at > 0).then_some(score)));
    }
    tokens.extend_from_slice(&sample.tokens);
    logprobs.extend(sample.logprobs.iter().copied().map(Some));
    Choice {
        index,
        text: ByteTokenizer.decode(&tokens),
        tokens,
        finish_reason: match sample.finish {
            engine::Finish::Stop => "stop",
            engine::Finish::Length => "length",
        },
        logprobs: wants_logprobs.then_some(ChoiceLogprobs { token_logprobs: logprobs }),
    }
}

fn empty_sample() -> Sample {
    Sample { tokens: Vec::new(), logprobs: Vec::new(), finish: engine::Finish::Length }
}

fn stop_tokens(texts: &[String]) -> Vec<u32> {
    texts.iter().filter_map(|text| ByteTokenizer.encode(text).first().copied()).collect()
}

/// A seed for a request that names none: no two requests share it.
fn arbitrary(number: u64) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(number)
}

impl Prompts {
    fn tokens(self) -> Result<Vec<Vec<u32>>> {
        let lists = match self {
            Self::Text(text) => vec![ByteTokenizer.encode(&text)],
            Self::Texts(texts) => texts.iter().map(|text| ByteTokenizer.encode(text)).collect(),
            Self::Tokens(tokens) => vec![tokens],
            Self::TokenLists(lists) => lists,
        };
        if lists.is_empty() || lists.len() > MAX_PROMPTS || lists.iter().any(Vec::is_empty) {
            return Err(Error::invalid(format!(
                "{} prompts: wanted 1 to {MAX_PROMPTS}, none empty",
                lists.len()
            )));
        }
        Ok(lists)
    }
}
