//! What was measured, as Markdown, as JSON, and as a verdict.
//!
//! A cell that has no number says why: `missing` (the subject is not on this machine), `cannot` (it has no such
//! feature), `failed`. The reasons stand below the tables, so that nothing is skipped in silence.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::Serialize;

use crate::{
    case,
    config::Unable,
    error::{BenchError, Result},
    subject::{Kind, Subject},
};

/// The tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// µs per exchange.
    Cpu,
    /// User instructions per exchange.
    Instructions,
    /// System calls per exchange.
    Syscalls,
    /// MiB and KiB.
    Memory,
    /// Milliseconds.
    Start,
    /// By the row's unit.
    Xds,
}

impl Metric {
    /// All, in the order of the report.
    pub const ALL: [Self; 6] =
        [Self::Cpu, Self::Instructions, Self::Syscalls, Self::Memory, Self::Start, Self::Xds];

    /// Name for `--only`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Instructions => "instructions",
            Self::Syscalls => "syscalls",
            Self::Memory => "memory",
            Self::Start => "start",
            Self::Xds => "xds",
        }
    }

    /// The reverse of [`Metric::name`].
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|metric| metric.name() == name)
    }

    /// What follows a number of this table in a sentence.
    fn amount(self, unit: &str) -> String {
        match self {
            Self::Cpu => format!(" µs per {unit}"),
            Self::Instructions | Self::Syscalls => format!(" per {unit}"),
            Self::Memory | Self::Start | Self::Xds => format!(" {unit}"),
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Cpu => "CPU time of the proxy (µs; ratio to Envoy, median of rounds)",
            Self::Instructions => "User instructions of the proxy (callgrind; ratio to Envoy)",
            Self::Syscalls => "System calls of the proxy (strace; ratio to Envoy)",
            Self::Memory => "Resident memory",
            Self::Start => "Start until ready",
            Self::Xds => "Driven by a control plane (ratio to Envoy)",
        }
    }
}

/// What Sampan must reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// At most this share of Envoy's value.
    Ratio(f64),
    /// At most this value, in the row's unit.
    Value(f64),
}

impl Target {
    /// Whether a value meets it. A ratio without Envoy is not met: nothing was shown.
    #[must_use]
    pub fn met(self, value: &Value) -> bool {
        match self {
            Self::Ratio(most) => value.ratio.is_some_and(|ratio| ratio <= most),
            Self::Value(most) => value.value <= most,
        }
    }

    fn shown(self) -> String {
        match self {
            Self::Ratio(most) => format!("≤ {most:.2} × Envoy"),
            Self::Value(most) => format!("≤ {}", number(most)),
        }
    }
}

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub struct Value {
    /// In the row's unit.
    pub value: f64,
    /// To Envoy's value of the same row.
    pub ratio: Option<f64>,
    /// What the figure is made of, for the JSON.
    pub detail: serde_json::Value,
}

impl Value {
    /// A figure that is not made of others.
    #[must_use]
    pub fn plain(value: f64) -> Self {
        Self { value, ratio: None, detail: serde_json::Value::Null }
    }
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "lowercase")]
enum Cell {
    Value(Value),
    Cannot(&'static str),
    Failed(String),
}

#[derive(Debug, Serialize)]
struct Row {
    metric: Metric,
    case: &'static str,
    unit: &'static str,
    target: Option<Target>,
    cells: BTreeMap<Kind, Cell>,
}

#[derive(Debug, Serialize)]
struct Missing {
    kind: Kind,
    why: String,
}

/// The whole run.
#[derive(Debug, Serialize)]
pub struct Report {
    settings: String,
    subjects: Vec<Subject>,
    missing: Vec<Missing>,
    rows: Vec<Row>,
}

impl Report {
    /// An empty one. `settings` is a line that tells how the run was made.
    #[must_use]
    pub fn new(settings: String) -> Self {
        Self { settings, subjects: Vec::new(), missing: Vec::new(), rows: Vec::new() }
    }

    /// A subject that takes part.
    pub fn present(&mut self, subject: &Subject) {
        self.subjects.push(subject.clone());
    }

    /// A subject that was asked for and is not there.
    pub fn missing(&mut self, kind: Kind, why: String) {
        self.missing.push(Missing { kind, why });
    }

    /// A figure, or why there is none.
    pub fn record(
        &mut self,
        metric: Metric,
        case: &'static str,
        unit: &'static str,
        kind: Kind,
        value: Result<Value>,
    ) {
        let cell = match value {
            Ok(value) => Cell::Value(value),
            Err(error) => Cell::Failed(error.to_string()),
        };
        self.put(metric, case, unit, kind, cell);
    }

    /// A subject that has no such feature.
    pub fn cannot(
        &mut self,
        metric: Metric,
        case: &'static str,
        unit: &'static str,
        kind: Kind,
        why: Unable,
    ) {
        self.put(metric, case, unit, kind, Cell::Cannot(why));
    }

    fn put(&mut self, metric: Metric, case: &'static str, unit: &'static str, kind: Kind, cell: Cell) {
        let found = self.rows.iter().position(|row| row.metric == metric && row.case == case);
        let index = found.unwrap_or_else(|| {
            let target = case::target(metric, case);
            self.rows.push(Row { metric, case, unit, target, cells: BTreeMap::new() });
            self.rows.len() - 1
        });
        let cells = &mut self.rows[index].cells;
        cells.insert(kind, cell);
        // Ratios of what is not measured in rounds follow from the two values, whichever came first.
        let Some(Cell::Value(envoy)) = cells.get(&Kind::Envoy) else { return };
        let envoy = envoy.value;
        for cell in cells.values_mut() {
            if let Cell::Value(value) = cell {
                value.ratio = value.ratio.or((envoy > 0.0).then_some(value.value / envoy));
            }
        }
    }

    /// What `--check` complains of: targets that Sampan misses or that could not be judged.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let mut all = Vec::new();
        if let Some(missing) = self.missing.iter().find(|m| m.kind == Kind::Sampan) {
            all.push(format!("sampan is missing: {}", missing.why));
            return all;
        }
        for row in &self.rows {
            let name = format!("{} {}", row.metric.name(), row.case);
            match (row.cells.get(&Kind::Sampan), row.target) {
                (Some(Cell::Value(value)), Some(target)) if !target.met(value) => {
                    let ratio = value.ratio.map_or("no ratio".to_owned(), |r| format!("{r:.2} × Envoy"));
                    all.push(format!(
                        "{name}: {}{} ({ratio}), wanted {}",
                        number(value.value),
                        row.metric.amount(row.unit),
                        target.shown()
                    ));
                }
                (Some(Cell::Failed(why)), _) => all.push(format!("{name}: failed: {why}")),
                (None, Some(_)) => all.push(format!("{name}: not measured")),
                _ => {}
            }
        }
        if self.rows.is_empty() {
            all.push("nothing was measured".to_owned());
        }
        all
    }

    /// For machines.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|e| BenchError::Usage(format!("JSON: {e}")))
    }

    /// For people.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut out = format!("{}\n\n", self.settings);
        for subject in &self.subjects {
            let _ = writeln!(out, "- {}: {}", subject.kind.name(), subject.version);
        }
        for missing in &self.missing {
            let _ = writeln!(out, "- {}: **missing** ({})", missing.kind.name(), missing.why);
        }
        for metric in Metric::ALL {
            let rows: Vec<&Row> = self.rows.iter().filter(|row| row.metric == metric).collect();
            if !rows.is_empty() {
                self.table(&mut out, metric, &rows);
            }
        }
        self.reasons(&mut out);
        out
    }

    fn kinds(&self) -> Vec<Kind> {
        let asked = |kind: &Kind| {
            self.subjects.iter().any(|s| s.kind == *kind) || self.missing.iter().any(|m| m.kind == *kind)
        };
        Kind::ALL.into_iter().filter(asked).collect()
    }

    fn table(&self, out: &mut String, metric: Metric, rows: &[&Row]) {
        let kinds = self.kinds();
        let _ = write!(out, "\n### {}\n\n| Case | Unit |", metric.title());
        for kind in &kinds {
            let _ = write!(out, " {} |", kind.name());
        }
        let _ = write!(out, " Target for Sampan |\n|---|---|{}---|\n", "---:|".repeat(kinds.len()));
        for row in rows {
            let _ = write!(out, "| {} | {} |", row.case, row.unit);
            for kind in &kinds {
                let _ = write!(out, " {} |", self.cell(row, *kind));
            }
            let target = row.target.map_or(String::new(), |target| {
                let verdict = match row.cells.get(&Kind::Sampan) {
                    Some(Cell::Value(value)) if target.met(value) => ", met",
                    Some(Cell::Value(_)) => ", **missed**",
                    _ => ", not shown",
                };
                target.shown() + verdict
            });
            let _ = writeln!(out, " {target} |");
        }
    }

    fn cell(&self, row: &Row, kind: Kind) -> String {
        match row.cells.get(&kind) {
            Some(Cell::Value(value)) => match value.ratio {
                Some(ratio) if kind != Kind::Envoy => format!("{} ({ratio:.2})", number(value.value)),
                _ => number(value.value),
            },
            Some(Cell::Cannot(_)) => "cannot".into(),
            Some(Cell::Failed(_)) => "**failed**".into(),
            None if self.missing.iter().any(|m| m.kind == kind) => "missing".into(),
            None => "not measured".into(),
        }
    }

    fn reasons(&self, out: &mut String) {
        let mut reasons: BTreeMap<(Kind, String), Vec<String>> = BTreeMap::new();
        for row in &self.rows {
            for (kind, cell) in &row.cells {
                let why = match cell {
                    Cell::Value(_) => continue,
                    Cell::Cannot(why) => format!("cannot: {why}"),
                    Cell::Failed(why) => format!("failed: {why}"),
                };
                let rows = reasons.entry((*kind, why)).or_default();
                let name = row.case.to_owned();
                if !rows.contains(&name) {
                    rows.push(name);
                }
            }
        }
        if !reasons.is_empty() {
            out.push_str("\nNot measured:\n\n");
        }
        for ((kind, why), rows) in reasons {
            let _ = writeln!(out, "- {}, {}: {why}", kind.name(), rows.join(", "));
        }
    }
}

/// Three significant digits or whole numbers, thousands apart.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    let text = format!("{value:.decimals$}");
    let digits = text.len() - usize::from(text.starts_with('-'));
    if decimals > 0 || digits <= 4 {
        return text;
    }
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i > 0 && (text.len() - i).is_multiple_of(3) && !out.ends_with('-') {
            out.push(' ');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests;
