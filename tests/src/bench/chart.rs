//! A bar for each goal: how far it was reached, on a scale where the goal itself is 1 and more
//! is better.

use std::fmt::Write as _;

use super::{Check, Subject};

const WIDTH: f64 = 900.0;
const LABELS: f64 = 400.0;
const SCALE: f64 = 180.0;
/// What is better than this by far is drawn so long.
const MOST: f64 = 2.2;
const ROW: f64 = 20.0;
const TOP: f64 = 40.0;

pub(super) fn draw(checks: &[(Subject, &Check)]) -> String {
    let height = TOP + ROW * checks.len() as f64 + 16.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <title>What was reached, as a share of each goal</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    let goal = LABELS + SCALE;
    for (mark, label) in [(0.0, "0"), (0.5, "½"), (1.0, "goal"), (1.5, "1½"), (2.0, "2 ×")] {
        let x = LABELS + mark * SCALE;
        let _written = writeln!(
            svg,
            "<line x1=\"{x}\" x2=\"{x}\" y1=\"{}\" y2=\"{}\" stroke=\"#d0d7de\"/>\
             <text x=\"{x}\" y=\"{}\" text-anchor=\"middle\" fill=\"#57606a\">{label}</text>",
            TOP - 8.0,
            height - 12.0,
            TOP - 14.0,
        );
    }
    for (number, (subject, check)) in (0_u16..).zip(checks) {
        let y = TOP + ROW * f64::from(number);
        let reached = check.share(check.reached.median());
        let bar = |share: f64| share.clamp(0.0, MOST) * SCALE;
        let colour = if check.is_met() { "#2da44e" } else { "#cf222e" };
        let _written = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#24292f\">{subject:?} {}</text>\
             <rect x=\"{LABELS}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{}\" fill=\"#57606a\">{}</text>",
            LABELS - 8.0,
            y + 13.0,
            escaped(&check.what),
            y + 3.0,
            bar(reached),
            ROW - 6.0,
            LABELS + bar(reached) + 5.0,
            y + 13.0,
            escaped(&check.unit.show(check.reached.median())),
        );
        // Least and most.
        let ends = [check.reached.least(), check.reached.most()].map(|end| bar(check.share(end)));
        let [from, to] = ends.map(|end| LABELS + end);
        let middle = y + ROW / 2.0;
        let _written = writeln!(
            svg,
            "<line x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{middle}\" y2=\"{middle}\" \
             stroke=\"#24292f\" stroke-width=\"1.5\"/>"
        );
        if let Some(floor) = &check.floor {
            let x = LABELS + bar(check.share(floor.reached.median()));
            let _written = writeln!(
                svg,
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{}\" y2=\"{}\" stroke=\"#0969da\" \
                 stroke-width=\"2\" stroke-dasharray=\"3 2\"><title>floor: {}</title></line>",
                y + 1.0,
                y + ROW - 1.0,
                escaped(&floor.of),
            );
        }
    }
    let _written = writeln!(
        svg,
        "<line x1=\"{goal}\" x2=\"{goal}\" y1=\"{}\" y2=\"{}\" stroke=\"#24292f\" \
         stroke-width=\"1.5\"/>\n\
         <text x=\"8\" y=\"{}\" fill=\"#57606a\">line: least to most; blue: the floor</text>\n</svg>",
        TOP - 8.0,
        height - 12.0,
        TOP - 14.0,
    );
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
