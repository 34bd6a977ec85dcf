//! The figures, and the table of them.

use comfy_table::{CellAlignment, Table};
use serde::Serialize;

use crate::{conditions::Conditions, measure::Run, module::Module};

/// What a figure should be.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Goal {
    AtLeast(f64),
    Below(f64),
}

impl Goal {
    fn met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::Below(bound) => value < bound,
        }
    }
}

/// Everything that was measured.
#[derive(Serialize)]
pub(crate) struct Report {
    conditions: Conditions,
    figures: Vec<Figure>,
    processor: Vec<Processor>,
}

#[derive(Serialize)]
struct Figure {
    group: &'static str,
    name: String,
    unit: &'static str,
    #[serde(flatten)]
    values: Values,
    goal: Option<Goal>,
    goal_is_for: Option<Module>,
    met: Option<bool>,
}

/// One value for each module, where it was measured.
#[derive(Default, Serialize)]
struct Values {
    hsm_sim: Option<f64>,
    softhsm2: Option<f64>,
}

impl Values {
    const fn of(&mut self, module: Module) -> &mut Option<f64> {
        match module {
            Module::HsmSim => &mut self.hsm_sim,
            Module::Softhsm2 => &mut self.softhsm2,
        }
    }
}

/// Who used the processor during a measurement, in cores.
#[derive(Serialize)]
struct Processor {
    module: Module,
    what: String,
    server_cores: f64,
    load_generator_cores: f64,
}

impl Report {
    pub(crate) const fn new(conditions: Conditions) -> Self {
        Self { conditions, figures: Vec::new(), processor: Vec::new() }
    }

    /// Takes a figure; figures of two modules with one name share a row.
    pub(crate) fn add(&mut self, group: &'static str, name: impl Into<String>, unit: &'static str, module: Module, value: f64) {
        let name = name.into();
        eprintln!("  {:<8} {name}: {} {unit}", module.name(), shown(value));
        let known = self.figures.iter().position(|figure| figure.group == group && figure.name == name);
        let at = known.unwrap_or_else(|| {
            self.figures.push(Figure { group, name, unit, values: Values::default(), goal: None, goal_is_for: None, met: None });
            self.figures.len() - 1
        });
        if let Some(figure) = self.figures.get_mut(at) {
            *figure.values.of(module) = Some(value);
        }
    }

    /// As [`Self::add`], with a goal that holds for this module.
    pub(crate) fn add_with_goal(&mut self, group: &'static str, name: impl Into<String>, unit: &'static str, module: Module, value: f64, goal: Goal) {
        let name = name.into();
        self.add(group, name.clone(), unit, module, value);
        if let Some(figure) = self.figures.iter_mut().find(|figure| figure.group == group && figure.name == name) {
            (figure.goal, figure.goal_is_for, figure.met) = (Some(goal), Some(module), Some(goal.met(value)));
        }
    }

    /// Who used the processor during a run.
    pub(crate) fn processor(&mut self, module: Module, what: &str, run: &Run) {
        self.processor.push(Processor { module, what: what.to_owned(), server_cores: run.server_cores, load_generator_cores: run.client_cores });
    }

    pub(crate) fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self)
    }

    pub(crate) fn to_text(&self) -> String {
        let mut table = table(["what", "unit", Module::HsmSim.name(), Module::Softhsm2.name(), "goal", "met"], &[2, 3]);
        let mut group = "";
        for figure in &self.figures {
            if figure.group != group {
                group = figure.group;
                table.add_row([group.to_owned()]);
            }
            let value = |value: Option<f64>| value.map(shown).unwrap_or_default();
            let goal = match (figure.goal, figure.goal_is_for) {
                (Some(Goal::AtLeast(least)), Some(module)) => format!("{}: ≥ {}", module.name(), shown(least)),
                (Some(Goal::Below(bound)), Some(module)) => format!("{}: < {}", module.name(), shown(bound)),
                _ => String::new(),
            };
            let met = figure.met.map_or("", |met| if met { "yes" } else { "NO" });
            table.add_row([&format!("  {}", figure.name), figure.unit, &value(figure.values.hsm_sim), &value(figure.values.softhsm2), &goal, met]);
        }
        let mut processor = self::table(["processor while measuring", "module", "server, cores", "load generator, cores"], &[2, 3]);
        for row in &self.processor {
            processor.add_row([&row.what, row.module.name(), &format!("{:.2}", row.server_cores), &format!("{:.2}", row.load_generator_cores)]);
        }
        format!("{}\n{table}\n\n{processor}", self.conditions)
    }
}

fn table<const N: usize>(header: [&str; N], numbers: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN).set_header(header);
    for column in numbers {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// A figure with as many digits as it is worth.
pub(crate) fn shown(value: f64) -> String {
    if !value.is_finite() {
        return "?".to_owned();
    }
    if value.abs() < 100.0 {
        let text = format!("{value:.2}");
        return text.strip_suffix(".00").map_or(text.clone(), str::to_owned);
    }
    let digits = format!("{value:.0}");
    let mut text = String::with_capacity(digits.len() + 4);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
