//! `cargo xtask trace-svg`: a picture of a stretch of a timeline, by default of one direct flush.
//!
//! A row for each processor, a colour for each level, arrows for kicks, and below it which colour is what.

use crate::ctx::{Ctx, Result};
use crate::trace::{self, Event, Span, Timeline};
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

/// Options of `cargo xtask trace-svg`.
#[derive(clap::Args)]
pub struct Args {
    /// What L0 said in a traced run: `l0.txt` of a run's directory
    #[arg(value_name = "LOG")]
    log: PathBuf,
    /// The picture
    #[arg(value_name = "SVG")]
    svg: PathBuf,
    /// First tick shown, instead of shortly before the direct flush with the most kicks
    #[arg(long, value_name = "TICK", requires = "to")]
    from: Option<u64>,
    /// Last tick shown
    #[arg(long, value_name = "TICK", requires = "from")]
    to: Option<u64>,
}

/// Draws it.
pub fn run(_ctx: &Ctx, args: Args) -> Result<()> {
    let said = fs::read_to_string(&args.log).map_err(|e| format!("cannot read {}: {e}", args.log.display()))?;
    let timeline = Timeline::new(&trace::records(&said));
    let window = match (args.from, args.to) {
        (Some(from), Some(to)) if from < to => (from, to),
        (Some(_), Some(_)) => return Err("--from must be before --to".into()),
        _ => around_a_flush(&timeline).ok_or("no direct flush in this timeline: give --from and --to")?,
    };
    fs::write(&args.svg, draw(&timeline, window)).map_err(|e| format!("cannot write {}: {e}", args.svg.display()))?;
    println!("ticks {} to {}", window.0, window.1);
    Ok(())
}

/// From shortly before a direct flush until all its targets run again, and a little more.
pub fn around_a_flush(timeline: &Timeline) -> Option<(u64, u64)> {
    let flush = timeline.best_flush()?;
    let mut end = flush.end;
    for mark in timeline.marks.iter().filter(|m| timeline.is_kick_of(m, flush)) {
        let Event::Kick(to) = mark.event else { continue };
        let Some(arrival) = timeline.arrival(to, mark.at) else { continue };
        let handled = timeline.spans.iter().find(|s| s.cpu == to && s.level == 0 && s.start == arrival);
        end = end.max(handled.map_or(arrival, |s| s.end));
    }
    let more = (end - flush.start) / 6 + 1;
    Some((flush.start.saturating_sub(more), end + more))
}

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 70.0;
const ROW: f64 = 70.0;
const BAR: f64 = 34.0;
const TOP: f64 = 50.0;
const COLOURS: [&str; 3] = ["#d9822b", "#4a7fb5", "#6aa84f"];

/// The picture of the ticks from `window.0` to `window.1`.
pub fn draw(timeline: &Timeline, window: (u64, u64)) -> String {
    let (from, to) = window;
    let x = |tick: u64| {
        let share = (tick.clamp(from, to) - from) as f64 / (to - from).max(1) as f64;
        LEFT + share * (WIDTH - LEFT - 20.0)
    };
    let y = |cpu: usize| TOP + cpu as f64 * ROW;
    let height = y(timeline.cpus) + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <defs><marker id=\"tip\" markerWidth=\"8\" markerHeight=\"8\" refX=\"7\" refY=\"4\" orient=\"auto\">\
         <path d=\"M0,0 L8,4 L0,8 z\" fill=\"#a00\"/></marker></defs>\n"
    );
    axis(&mut svg, window, &x, height);
    for cpu in 0..timeline.cpus {
        let _ = writeln!(svg, "<text x=\"8\" y=\"{}\" font-weight=\"bold\">CPU {cpu}</text>", y(cpu) + BAR / 2.0 + 4.0);
    }
    for span in timeline.spans.iter().filter(|s| s.end >= from && s.start <= to) {
        bar(&mut svg, span, x(span.start), x(span.end), y(span.cpu));
    }
    for mark in timeline.marks.iter().filter(|m| (from..=to).contains(&m.at)) {
        let (at, top) = (x(mark.at), y(mark.cpu));
        match mark.event {
            Event::Kick(target) => {
                let Some(arrival) = timeline.arrival(target, mark.at).filter(|a| *a <= to) else { continue };
                let down = target > mark.cpu;
                let (start, end) = if down { (top + BAR, y(target)) } else { (top, y(target) + BAR) };
                let _ = writeln!(
                    svg,
                    "<line x1=\"{at:.1}\" y1=\"{start}\" x2=\"{:.1}\" y2=\"{end}\" stroke=\"#a00\" \
                     stroke-width=\"1.5\" marker-end=\"url(#tip)\"><title>kick</title></line>",
                    x(arrival)
                );
            }
            event => {
                let text = if matches!(event, Event::Drained(_)) { "queue drained" } else { "synthetic exit" };
                let below = top + BAR;
                let _ = writeln!(
                    svg,
                    "<path d=\"M{at:.1},{below} l-4,8 h8 z\" fill=\"#333\"/>\
                     <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{text}</text>",
                    below + 19.0
                );
            }
        }
    }
    legend(&mut svg, height - 16.0);
    svg + "</svg>\n"
}

fn bar(svg: &mut String, span: &Span, start: f64, end: f64, top: f64) {
    let waits = span.name == "wait";
    let (colour, top, tall) = match waits {
        true => ("#f6d9b8", top + BAR - 15.0, 13.0),
        false => (COLOURS[usize::from(span.level).min(2)], top, BAR),
    };
    let wide = (end - start).max(0.5);
    let _ = writeln!(
        svg,
        "<rect x=\"{start:.1}\" y=\"{top}\" width=\"{wide:.1}\" height=\"{tall}\" fill=\"{colour}\"><title>{}: {} \
         ticks</title></rect>",
        span.name,
        span.end - span.start
    );
    // As much text as there is room for.
    if wide > 7.0 * span.name.len() as f64 {
        let fill = if waits { "#333" } else { "#fff" };
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" fill=\"{fill}\" text-anchor=\"middle\">{}</text>",
            start + wide / 2.0,
            if waits { top + 10.5 } else { top + 14.0 },
            span.name
        );
    }
}

fn axis(svg: &mut String, (from, to): (u64, u64), x: &impl Fn(u64) -> f64, height: f64) {
    // Four to ten round steps.
    let power = 10u64.pow(((to - from) / 4).max(1).ilog10());
    let step = [5, 2, 1].map(|n| n * power).into_iter().find(|step| (to - from) / step >= 4).unwrap_or(1);
    for tick in (0..=(to - from) / step).map(|n| n * step) {
        let at = x(from + tick);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"28\" x2=\"{at:.1}\" y2=\"{}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"20\" text-anchor=\"middle\">{tick}</text>",
            height - 36.0
        );
    }
}

fn legend(svg: &mut String, y: f64) {
    let entries = [("L0", COLOURS[0]), ("L0 waits", "#f6d9b8"), ("L1", COLOURS[1]), ("L2", COLOURS[2])];
    for (i, (text, colour)) in entries.into_iter().enumerate() {
        let x = LEFT + i as f64 * 90.0;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{}\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{}\" y=\"{y}\">{text}</text>",
            y - 10.0,
            x + 17.0
        );
    }
    let x = LEFT + 4.0 * 90.0;
    let _ =
        writeln!(svg, "<text x=\"{x}\" y=\"{y}\">arrows: kicks; the scale is ticks of the time stamp counter</text>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_is_in_the_picture() {
        let timeline = Timeline::new(&trace::records(trace::tests::FLUSH));
        let window = around_a_flush(&timeline).unwrap();
        // The flush ends at 0x1a0, its target runs again at 0x1d0.
        assert!(window.0 < 0x100 && window.1 > 0x1d0, "{window:?}");
        let svg = draw(&timeline, window);
        for part in ["CPU 1", "L2 VMMCALL flush list", "wait", "queue drained", "marker-end"] {
            assert!(svg.contains(part), "{part}");
        }
        let (opened, closed) = (svg.matches("<text").count(), svg.matches("</text>").count());
        assert_eq!(opened, closed);
        assert!(!draw(&timeline, (0, 0x80)).contains("marker-end=\"url"));
    }
}
