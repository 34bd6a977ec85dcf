//! Progress on standard error, where that is a terminal; standard output carries results only.

use std::{fmt, pin::pin, time::Duration};

use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

/// Waits for an answer. After a second it shows what it waits for.
pub(crate) async fn waiting<T>(what: &str, answer: impl Future<Output = T>) -> T {
    let mut answer = pin!(answer);
    tokio::select! {
        result = &mut answer => result,
        () = tokio::time::sleep(Duration::from_secs(1)) => {
            let spinner = spinner(what);
            let result = answer.await;
            spinner.finish_and_clear();
            result
        }
    }
}

/// A bar that counts octets.
pub(crate) fn octets(what: &str, total: u64) -> ProgressBar {
    bar(what, total, "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left")
}

/// A bar that counts things.
pub(crate) fn count(what: &str, total: u64) -> ProgressBar {
    bar(what, total, "{msg} {wide_bar} {human_pos}/{human_len}  {rate}  {eta} left")
}

/// A spinner with a message.
pub(crate) fn spinner(what: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(what.to_owned());
    spinner.set_draw_target(ProgressDrawTarget::stderr());
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}

fn bar(what: &str, total: u64, template: &str) -> ProgressBar {
    let rate = |state: &ProgressState, text: &mut dyn fmt::Write| {
        let _ = write!(text, "{} a second", HumanCount(state.per_sec() as u64));
    };
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .with_key("rate", rate)
        .progress_chars("##-");
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
        .with_style(style)
        .with_message(what.to_owned());
    // Rate and remaining time change even if nothing arrives.
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}
